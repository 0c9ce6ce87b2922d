"""What makes text from anywhere safe inside a shell script."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.render.shell import Variable, comment, number, quote


@given(st.text())
def test_a_quoted_text_is_one_word_and_the_same(text: str) -> None:
    assert shlex.split(quote(text)) == [text]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_quoted_number_reads_back_exactly(value: float) -> None:
    (word,) = shlex.split(quote(value))
    assert float(word) == value


@given(st.text())
def test_a_comment_stays_on_its_line(text: str) -> None:
    shown = comment(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4095, "4095"),
        (1e-05, "1e-05"),
        ("4095,0", "'4095,0'"),
        ("Et*7|t*9L", "'Et*7|t*9L'"),
        ("it's", "'it'\"'\"'s'"),
        (Variable("LR", 3e-4), '"${LR:-0.0003}"'),
    ],
)
def test_words(value: str | int | float | Variable, expected: str) -> None:
    assert quote(value) == expected


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.1, 1.0, 500000)] == ["0.1", "1.0", "500000"]
