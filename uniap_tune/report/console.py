"""What all reports share: the console, labelled sentences, and how tables show stages.

Everything fits 80 columns; colour only on a terminal and never with NO_COLOR.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from uniap_tune.plan import Stage
from uniap_tune.prose import wrap

WIDTH = 80
_LABEL = 13
_MOST_STAGES = 16


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that has seen enough is the command line's to deal with; rich would end with exit code 1."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output, at most 80 columns wide, without markup or automatic highlighting."""
    found = _Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    found.width = min(found.width, WIDTH)
    return found


def print_sentence(out: Console, label: str, text: str, *, label_width: int = _LABEL, indent: int = 0) -> None:
    """A label, and beside it the lines of a text."""
    for number, line in enumerate(wrap(text, out.width - label_width - indent)):
        head = label if number == 0 else ""
        out.print(Text(head.ljust(label_width), style="bold") + Text(" " * indent + line))


def stage_numbers(count: int) -> list[int | None]:
    """The stages that a table shows; ``None`` stands for those left out in the middle."""
    if count <= _MOST_STAGES:
        return list(range(count))
    return [*range(_MOST_STAGES - 3), None, count - 2, count - 1]


def layers_text(stage: Stage) -> str:
    """What a stage holds: ``"E+20"`` is the embedding and 20 blocks, ``H`` the head."""
    parts = []
    if "embedding" in stage.layers:
        parts.append("E")
    if stage.num_blocks:
        parts.append(str(stage.num_blocks))
    if "head" in stage.layers:
        parts.append("H")
    return "+".join(parts)
