"""How the split of the layers is told to Megatron: the shortest expression that means the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.megatron.facts import MegatronFacts
from uniap_tune.render.layout import layout_string, pipeline_arguments

FIRST = "--decoder-first-pipeline-num-layers"
LAST = "--decoder-last-pipeline-num-layers"
LAYOUT = "--pipeline-model-parallel-layout"


def expand(text: str) -> list[str]:
    """The stages of a layout, by a reader of the grammar that has nothing in common with the writer.

    ``group = "(" symbols ")*" number``, ``run = symbol "*" number``; stages are separated by ``|``.
    """
    out, position = "", 0
    while position < len(text):
        if text[position] == "(":
            close = text.index(")", position)
            unit, position = "".join(expand_runs(text[position + 1 : close])), close + 1
        else:
            unit, position = text[position], position + 1
        digits = ""
        if text[position : position + 1] == "*":
            position += 1
            while position < len(text) and text[position].isdigit():
                digits, position = digits + text[position], position + 1
        out += unit * int(digits or 1)
    return out.split("|")


def expand_runs(text: str) -> list[str]:
    """The symbols of a group."""
    return ["|".join(expand(text))]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([32], {}),
        ([8, 8, 8, 8], {}),
        ([15, 17], {FIRST: 15}),
        ([7, 8, 8, 8], {FIRST: 7}),
        ([8, 8, 8, 7], {LAST: 7}),
        ([7, 8, 8, 6], {FIRST: 7, LAST: 6}),
        ([7, 9, 7], {FIRST: 7, LAST: 7}),
        ([0, 16], {LAYOUT: "E|t*16L"}),
        ([16, 0], {LAYOUT: "Et*16|L"}),
        ([0, 16, 16, 0], {LAYOUT: "E|(t*16|)*2L"}),
        ([7, 9, 8, 8], {LAYOUT: "Et*7|t*9|t*8|t*8L"}),
        ([1, 2, 3, 2], {LAYOUT: "Et|tt|ttt|ttL"}),
        ([7, 9, 9, 9, 8, 8], {LAYOUT: "Et*7|(t*9|)*3t*8|t*8L"}),
        ([7, 9, 8, 9, 8, 9, 8, 6], {LAYOUT: "Et*7|(t*9|t*8|)*3t*6L"}),
    ],
)
def test_the_shortest_expression(counts: list[int], expected: dict[str, object]) -> None:
    assert pipeline_arguments(counts) == {"--pipeline-model-parallel-size": len(counts), **expected}


def test_multi_token_prediction_stays_with_the_loss() -> None:
    assert layout_string([3, 0, 2], mtp_layers=1) == "Ettt||ttmL"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_the_layout_means_the_counts(counts: list[int]) -> None:
    text = layout_string(counts)
    stages = expand(text)
    assert [stage.count("t") for stage in stages] == counts
    assert stages[0][0] == "E"
    assert stages[-1][-1] == "L"
    assert "".join(stages).count("E") == "".join(stages).count("L") == 1


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_never_longer_than_written_out(counts: list[int]) -> None:
    plain = "|".join(f"t*{count}" for count in counts)
    assert len(layout_string(counts)) <= len(plain) + 2


VIRTUAL = "--num-virtual-stages-per-pipeline-rank"


@pytest.mark.parametrize(
    ("counts", "virtual", "expected"),
    [
        ([4] * 8, 2, {VIRTUAL: 2}),
        ([1] * 16, 4, {VIRTUAL: 4}),
        ([3, 4, 4, 5], 2, {LAYOUT: "Ettt|t*4|t*4|t*5L"}),
        ([4, 4, 4, 3], 2, {LAYOUT: "E(t*4|)*3tttL"}),
        ([0, 6, 6, 6, 6, 6, 6, 0], 4, {LAYOUT: "E|(t*6|)*6L"}),
        ([3, 4] + [4] * 13 + [3], 4, {LAYOUT: "Ettt|(t*4|)*14tttL"}),
    ],
)
def test_virtual_stages(counts: list[int], virtual: int, expected: dict[str, str | int]) -> None:
    pp = len(counts) // virtual
    assert pipeline_arguments(counts, virtual_stages=virtual) == {"--pipeline-model-parallel-size": pp} | expected


@given(st.integers(2, 8), st.integers(2, 6), st.data())
def test_virtual_stages_are_read_as_they_are_written(pp: int, virtual: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=pp * virtual, max_size=pp * virtual).filter(any))
    arguments = {
        name.removeprefix("--"): str(value)
        for name, value in pipeline_arguments(counts, virtual_stages=virtual).items()
    }
    facts = MegatronFacts({"num-layers": str(sum(counts)), **arguments}, world=pp)
    assert (facts.pp, facts.virtual, list(facts.chunks)) == (pp, virtual, counts)
