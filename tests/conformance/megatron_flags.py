"""Which arguments a Megatron-LM knows, by its own parser: ``megatron_flags.py FOLDER [SOURCE]``.

FOLDER: see ``megatron_stand_ins.py``. Without SOURCE the answer is JSON; with it, a sentence saying where FOLDER comes
from, it is the text of a table in ``uniap_tune/data/megatron``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import textwrap

from megatron_stand_ins import stand_in

HEADING = """\
# Arguments that this Megatron-LM knows, without dashes: switches, arguments with one value, and with several.
# Written by tests/conformance/megatron_flags.py from the parser of megatron/training/arguments.py.
"""


def parser() -> argparse.ArgumentParser:
    """Megatron's own, with all its arguments."""
    from megatron.training.arguments import add_megatron_arguments

    made = argparse.ArgumentParser(add_help=False)
    add_megatron_arguments(made)
    return made


def kinds(made: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Names by how many values they take."""
    found: dict[str, list[str]] = {"switches": [], "values": [], "lists": []}
    for action in made._actions:
        kind = "switches" if action.nargs == 0 else "values" if action.nargs is None else "lists"
        found[kind] += [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
    return {kind: sorted(names) for kind, names in found.items()}


def vocabulary() -> int:
    """Tokens of the null tokenizer when it is told 100."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    return int(NullTokenizer(100).vocab_size)


def table(found: dict[str, list[str]], version: str, source: str, extra: int) -> str:
    """The data file."""
    lines = [HEADING + f'version = "{version}"', f'source = "{source}"']
    lines += ["# Tokens that --tokenizer-type NullTokenizer adds to --vocab-size.", f"null_tokenizer_adds = {extra}"]
    for kind, names in found.items():
        words = textwrap.fill(" ".join(names), 118, break_on_hyphens=False, break_long_words=False)
        lines.append(f'{kind} = """\n{words}\n"""')
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print what the parser knows."""
    stand_in(sys.argv[1])
    with contextlib.redirect_stdout(io.StringIO()):
        from megatron.core import __version__ as version

        found, extra = kinds(parser()), vocabulary() - 100
    if len(sys.argv) > 2:
        print(table(found, version, sys.argv[2], extra), end="")
    else:
        print(json.dumps({"version": version, "null_tokenizer_adds": extra, **found}))


main()
