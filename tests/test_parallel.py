"""Several processes find what one finds."""

from __future__ import annotations

import multiprocessing
import warnings

import pytest

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.planner import Request, run
from uniap_tune.spec import Job
from uniap_tune.strategy import Target

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("jobs", [2, 3])
def test_same_plan(target: Target, jobs: int) -> None:
    request = Request(
        model=read_model("llama-2-7b"),
        cluster=read_cluster("1x8:a100-80gb"),
        job=Job(global_batch=32, seq_length=4096),
        target=target,
    )
    alone = run(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking beside threads
        together = run(request, jobs=jobs)
    assert together.plan.to_json() == alone.plan.to_json()
    assert [(p.pp, p.num_microbatches) for p in together.result.pairs] == [
        (p.pp, p.num_microbatches) for p in alone.result.pairs
    ]
    best = alone.plan.objective_s
    assert all(p.bound_s >= best * (1 - 1e-9) for p in together.result.pairs if p.objective_s is None)
