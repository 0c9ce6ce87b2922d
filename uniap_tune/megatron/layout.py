"""How many transformer layers each pipeline stage of Megatron holds: its layout strings and its other ways to say it.

The grammar is that of ``--pipeline-model-parallel-layout`` (megatron-core's pipeline_parallel_layer_layout.py):
symbols ``E t m L``, ``|`` between stages, ``x*n`` and ``(…)*n``; commas mean nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MOST_SYMBOLS = 100_000
_TOKEN = re.compile(r"\((?P<group>[^()]*)\)(?:\*(?P<groups>\d{1,6}))?|(?P<symbol>[EtmL|])(?:\*(?P<times>\d{1,6}))?")


@dataclass(frozen=True, slots=True)
class Layout:
    """The stages of a layout, virtual stages included, each with its symbols in order."""

    stages: tuple[str, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Transformer layers of each stage."""
        return tuple(stage.count("t") for stage in self.stages)

    def faults(self, num_layers: int, pp: int) -> str:
        """What Megatron would refuse about it; empty: nothing."""
        everything = "".join(self.stages)
        if len(self.stages) % pp:
            return f"it has {len(self.stages)} stages, which is no multiple of {pp}"
        if everything.count("t") != num_layers:
            return f"it has {everything.count('t')} layers (t), the model {num_layers}"
        if everything.count("E") != 1 or not everything.startswith("E"):
            return "the embedding (E) must come first, once"
        if everything.count("L") != 1 or not everything.endswith("L"):
            return "the loss (L) must come last, once"
        return ""


def parse_layout(text: str) -> Layout:
    """The stages of a layout string.

    Raises:
        ValueError: not in the grammar; says where.
    """
    symbols = _expand(re.sub(r"[\s,]", "", text), nested=False)
    return Layout(tuple(symbols.split("|")))


def _expand(text: str, *, nested: bool) -> str:
    expanded: list[str] = []
    size = at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or (nested and match["group"] is not None):
            raise ValueError(f"{text[at : at + 12]!r} is not of the layout's grammar")
        if match["group"] is not None:
            part = _expand(match["group"], nested=True) * int(match["groups"] or 1)
        else:
            part = match["symbol"] * int(match["times"] or 1)
        size += len(part)
        if size > _MOST_SYMBOLS:
            raise ValueError(f"more than {_MOST_SYMBOLS} symbols")
        expanded.append(part)
        at = match.end()
    return "".join(expanded)


def even(num_layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each of ``parts`` stages.

    Raises:
        ValueError: they do not divide.
    """
    if num_layers % parts:
        raise ValueError(f"{num_layers} layers do not divide over {parts} stages")
    return (num_layers // parts,) * parts


def first_and_last(num_layers: int, pp: int, first: int | None, last: int | None) -> tuple[int, ...]:
    """Layers of each stage, where the first and the last have their own number (``None``: that of the others).

    Raises:
        ValueError: the others do not divide.
    """
    others = pp - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    if left < 0 or others < 0 or (others == 0 and left) or (others and left % others):
        raise ValueError(f"{left} layers are left for {others} stages, which does not divide")
    share = left // others if others else 0
    sizes = [share] * pp
    sizes[0] = share if first is None else first
    sizes[-1] = share if last is None else last
    return tuple(sizes)


def accounted(num_layers: int, parts: int, *, embedding: bool, loss: bool) -> tuple[int, ...]:
    """Layers of each stage, where embedding or loss count as one layer.

    Raises:
        ValueError: they do not divide.
    """
    share = even(num_layers + embedding + loss, parts)[0]
    sizes = [share] * parts
    sizes[0] -= embedding
    sizes[-1] -= loss
    return tuple(sizes)
