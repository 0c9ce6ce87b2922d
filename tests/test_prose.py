"""Lines of a width, with figures kept whole."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.prose import wrap

TEXT = (
    "8.9 GiB more on every device would allow 26.65 s a step (-1.4%), pp 4, vpp 8, tp 4, dp 4, zero 1, micro-batch "
    "2 x 64, recompute none; stage 12 needs it, 77.57k tokens/s, --fix tp=8 --forbid zero=3, pp 4 -> 1, ZeRO 3"
)
WHOLE = (
    "8.9 GiB", "26.65 s", "pp 4", "vpp 8", "tp 4", "dp 4", "zero 1", "micro-batch 2 x 64", "recompute none", "stage 12",
    "77.57k tokens/s", "--fix tp=8", "--forbid zero=3", "pp 4 -> 1", "ZeRO 3", "(-1.4%)",
)  # fmt: skip


@pytest.mark.parametrize("width", range(20, 81, 7))
def test_figures_stay_whole(width: int) -> None:
    lines = wrap(TEXT, width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines) == TEXT
    for piece in WHOLE:
        assert any(piece in line for line in lines), piece


def test_a_word_longer_than_a_line_is_broken() -> None:
    lines = wrap("a " + "x" * 100 + " z", 40)
    assert max(map(len, lines)) <= 40
    assert "".join(lines).replace(" ", "") == "a" + "x" * 100 + "z"


@given(st.lists(st.sampled_from(["pp", "4", "GiB", "s", "-", "x", "a-b", "word", "1.5", "->"]), max_size=40))
def test_nothing_is_lost(words: list[str]) -> None:
    lines = wrap(" ".join(words), 60)
    assert re.split(r"\s+", " ".join(lines).strip()) == (words or [""])
