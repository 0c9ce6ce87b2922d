"""The least memory from prices alone: a bound always, exact where the module says so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.test_frontier import JOBS, plans, with_experts
from tests.tiny import Tiny, tiny
from uniap_tune.lean import least_bytes, least_seconds
from uniap_tune.problem import Problem
from uniap_tune.strategy import Target


def least_of_plans(problem: Problem) -> float:
    return min((size for _, size in plans(replace(problem, memory_limit_bytes=math.inf))), default=math.inf)


def bounds(job: Tiny) -> list[tuple[bool, float, float]]:
    """Of every problem whether the bound is exact, the bound, and the truth."""
    found = []
    for pp, c, family, problem in job.problems():
        number = problem.leading.count if problem.leading is not None else 0
        exact = family.virtual_stages == 1 and job.space.model.moe is None
        found.append((exact, least_bytes(job.pricer, pp, c, family, number), least_of_plans(problem)))
    return found


ALL_JOBS = JOBS | {
    "experts, any": with_experts(tiny(Target.ANY, num_layers=3, maximum=("zero=1", "ep=2"), global_batch=2)),
    "large ends": tiny(Target.MEGATRON, num_layers=3, vocab_size=60000, cluster="1x4:a100-80gb"),
    "four stages": tiny(Target.MEGATRON, num_layers=6, cluster="1x4:a100-80gb", fix=("pp=4",), global_batch=8),
}


@pytest.mark.parametrize("name", ALL_JOBS)
def test_least_bytes_are_a_bound(name: str) -> None:
    found = bounds(ALL_JOBS[name])
    assert found
    assert max(bound / truth for _, bound, truth in found if math.isfinite(truth)) > 0.99
    for exact, bound, truth in found:
        assert bound <= truth * (1 + 1e-12)
        if exact:
            assert bound == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("name", ALL_JOBS)
def test_least_seconds_are_a_bound_under_every_limit(name: str) -> None:
    for free, bound, truth in least_seconds_of(ALL_JOBS[name]):
        assert free <= bound <= truth * (1 + 1e-12)


def test_memory_raises_least_seconds() -> None:
    """Where cuts must be lopsided to fit, and only there, the bound is higher than without a limit."""
    found = list(least_seconds_of(JOBS["lopsided cuts"]))
    assert any(bound > free for free, bound, _ in found)
    assert any(bound == free > 0 for free, bound, _ in found)


def least_seconds_of(job: Tiny) -> Iterator[tuple[float, float, float]]:
    """Of every problem under several limits: the bound without a limit, the bound, and the truth."""
    for pp, c, family, problem in job.problems():
        number = problem.leading.count if problem.leading is not None else 0
        values = plans(replace(problem, memory_limit_bytes=math.inf))
        free = least_seconds(job.pricer, pp, c, family, number, math.inf)
        for limit in sorted({size for _, size in values})[::5]:
            truth = min(seconds for seconds, size in values if size <= limit)
            yield free, least_seconds(job.pricer, pp, c, family, number, limit), truth


def test_few_lean_blocks_are_not_taken_for_all() -> None:
    """Two dense blocks do not make the other three, which have experts, any leaner."""
    found = [(bound, truth) for _, bound, truth in bounds(ALL_JOBS["experts"])]
    assert min(bound / truth for bound, truth in found if math.isfinite(truth)) > 0.6
