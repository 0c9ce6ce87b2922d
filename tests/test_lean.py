"""The least memory from prices alone: a bound always, exact where the module says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.test_frontier import JOBS, plans
from tests.tiny import Tiny, tiny
from uniap_tune.lean import least_bytes
from uniap_tune.problem import Problem
from uniap_tune.strategy import Target


def least_of_plans(problem: Problem) -> float:
    return min((size for _, size in plans(replace(problem, memory_limit_bytes=math.inf))), default=math.inf)


def bounds(job: Tiny) -> list[tuple[bool, float, float]]:
    """Of every problem whether the bound is exact, the bound, and the truth."""
    found = []
    for pp, c, family, problem in job.problems():
        number = problem.leading.count if problem.leading is not None else 0
        single = len(family.blocks) == 1 or family.leading
        exact = single and family.virtual_stages == 1
        found.append((exact, least_bytes(job.pricer, pp, c, family, number), least_of_plans(problem)))
    return found


@pytest.mark.parametrize("name", [*JOBS, "large ends", "four stages"])
def test_it_is_a_bound(name: str) -> None:
    more = {
        "large ends": tiny(Target.MEGATRON, num_layers=3, vocab_size=60000, cluster="1x4:a100-80gb"),
        "four stages": tiny(Target.MEGATRON, num_layers=6, cluster="1x4:a100-80gb", fix=("pp=4",), global_batch=8),
    }
    found = bounds((JOBS | more)[name])
    assert found
    for exact, bound, truth in found:
        assert bound <= truth * (1 + 1e-12)
        if exact:
            assert bound == pytest.approx(truth, rel=1e-12)
