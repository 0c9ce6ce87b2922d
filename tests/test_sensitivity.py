"""Other networks, memories and batches, against planning for them by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.test_whatif import REQUESTS, planned
from uniap_tune.deadline import Deadline
from uniap_tune.explain.sensitivity import BATCH, MEMORY, NETWORK, Sensitivity, sensitivities
from uniap_tune.planner import Request, run


def by_hand(request: Request, item: Sensitivity) -> Request:
    """The request that a sensitivity is about."""
    cluster, job = request.cluster, request.job
    if item.changed == NETWORK:
        inter = replace(cluster.inter, bandwidth=item.factor * cluster.inter.bandwidth)
        return replace(request, cluster=replace(cluster, inter=inter))
    if item.changed == MEMORY:
        return request.with_memory_limit(item.factor * request.memory_limit_bytes)
    return replace(request, job=replace(job, global_batch=round(item.factor * job.global_batch)))


@pytest.mark.parametrize("name", ["two nodes", "roomy", "experts"])
def test_each_is_the_plan_of_the_changed_request(name: str) -> None:
    planning = planned(name)
    found = sensitivities(planning)
    changes = [(item.changed, item.factor) for item in found]
    network = [(NETWORK, 0.5), (NETWORK, 2.0)] if name == "two nodes" else []
    assert changes == [*network, (MEMORY, 0.9), (MEMORY, 1.1), (BATCH, 0.5), (BATCH, 2.0)]
    for item in found:
        if item.plan is None:
            assert item.why_none == "nothing fits"
            continue
        expected = run(by_hand(REQUESTS[name], item)).plan
        assert item.plan.stages == expected.stages
        assert item.faster == pytest.approx(expected.tokens_per_s / planning.plan.tokens_per_s - 1)


def test_the_network_and_the_memory_help_or_do_nothing() -> None:
    for name in ("two nodes", "tight"):
        found = {(item.changed, item.factor): item for item in sensitivities(planned(name))}
        best = planned(name).plan.objective_s
        for key, item in found.items():
            if item.plan is not None and key[0] != BATCH:
                assert (item.plan.objective_s - best) * (key[1] - 1) <= 1e-9 * best, key


def test_a_batch_that_cannot_be_divided_says_so() -> None:
    request = replace(
        REQUESTS["two nodes"], job=replace(REQUESTS["two nodes"].job, global_batch=8), memory_fraction=0.9
    )
    fixed = replace(request, knobs=replace(request.knobs, fix={"dp": "8"}))
    half = next(item for item in sensitivities(run(fixed)) if (item.changed, item.factor) == (BATCH, 0.5))
    assert half.plan is None
    assert "--fix dp=8" in half.why_none
    odd = replace(request, job=replace(request.job, global_batch=1), knobs=replace(request.knobs, fix={"dp": "1"}))
    assert (BATCH, 0.5) not in {(item.changed, item.factor) for item in sensitivities(run(odd))}


def test_without_time_nothing_is_claimed() -> None:
    known = {(item.changed, item.factor): item for item in sensitivities(planned("two nodes"))}
    for item in sensitivities(planned("two nodes"), Deadline(at=0.0)):
        assert item == known[item.changed, item.factor]
