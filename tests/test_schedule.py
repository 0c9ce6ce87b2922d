"""Closed forms of pipeline schedules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.schedule import Schedule, chunks_in_flight, step_seconds


def test_one_stage_repeats_its_micro_batches():
    assert step_seconds([2.0], [], 5) == 10.0


def test_equal_stages_have_the_bubble_of_the_paper():
    """arXiv 2104.04473 section 2.2: (p - 1) / m of the ideal time, 1 / v of it with v virtual stages."""
    assert step_seconds([1.0] * 4, [0.0] * 3, 8) == 8 + 3
    assert step_seconds([1.0] * 4, [0.0] * 3, 8, 3) == pytest.approx(8 + 3 / 3)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 32), st.floats(0, 1))
def test_a_step_is_at_least_its_slowest_stage_and_grows(stages, micro_batches, link):
    links = [link] * (len(stages) - 1)
    seconds = step_seconds(stages, links, micro_batches)
    assert seconds >= max(stages) * micro_batches * (1 - 1e-12)
    assert step_seconds(stages, links, micro_batches + 1) > seconds


def test_micro_batches_in_flight():
    assert [chunks_in_flight(i, 4, 16) for i in range(4)] == [[4], [3], [2], [1]]
    assert chunks_in_flight(0, 4, 2) == [2]
    assert chunks_in_flight(2, 4, 16, schedule=Schedule.GPIPE) == [16]


def test_interleaving_holds_megatrons_warm_up_passes():
    """Megatron-LM schedules.py: 2 (p - rank - 1) + (v - 1) p warm-up passes, and one more runs."""
    assert [sum(chunks_in_flight(i, 4, 16, 3)) for i in range(4)] == [15, 13, 11, 9]
    assert chunks_in_flight(3, 4, 16, 3) == [4, 4, 1]
    assert sum(chunks_in_flight(3, 4, 16, 3, group=5)) == 11
    assert sum(chunks_in_flight(0, 4, 1, 3)) == 3
