"""Sentences in lines of a given width, in which a figure stays with its unit and a name with its value."""

from __future__ import annotations

import re
import textwrap

_GLUE = "\N{NO-BREAK SPACE}"  # textwrap breaks at ASCII spaces only
_UNIT = re.compile(r"(?<=[\dkMBT]) (?=(?:[KMGT]iB|B|s|ms|us|GB/s|tokens/s|samples|devices|nodes|stages|times|x \d+)\b)")
_KNOBS = "pp|vpp|tp|cp|dp|ep|etp|mbs|microbatches|zero|recompute"
_NAME = re.compile(rf"(?<![\w-])({_KNOBS}|ZeRO|stage|stages|micro-batch|x|--fix|--max|--forbid) (?=\S)")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters; only a word longer than a line is broken."""
    text = text.replace(" -> ", f"{_GLUE}->{_GLUE}")
    text = _NAME.sub(rf"\1{_GLUE}", _UNIT.sub(_GLUE, text))
    return [line.replace(_GLUE, " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)]
