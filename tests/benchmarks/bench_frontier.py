"""CPU seconds of frontiers, in units of what one plan of the same job takes: on average at most 5 a point.

Run with ``pytest -o python_files='bench_*.py' -o python_functions='bench_*' tests/benchmarks/bench_frontier.py -s``.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_search import cpu
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.frontier.tradeoff import Tradeoff, against_memory
from uniap_tune.planner import Request, run
from uniap_tune.spec import Job
from uniap_tune.strategy import Target

# model, cluster, global batch, sequence length, target, how many points (None: all)
JOBS = [
    ("llama-2-13b", "1x8:a100-40gb", 64, 4096, "megatron", 16),
    ("llama-2-13b", "1x8:a100-40gb", 64, 4096, "megatron", None),
    ("llama-2-13b", "1x8:a100-40gb", 64, 4096, "deepspeed", None),
    ("llama-2-13b", "1x8:a100-40gb", 64, 4096, "any", 16),
    ("gpt-3-175b", "32x8:a100-80gb", 1536, 2048, "megatron", 16),
    ("gpt-3-175b", "32x8:a100-80gb", 1536, 2048, "megatron", None),
]


@pytest.mark.parametrize(("model", "cluster", "batch", "length", "target", "count"), JOBS)
def bench_points(model: str, cluster: str, batch: int, length: int, target: str, count: int | None) -> None:
    request = Request(
        model=read_model(model),
        cluster=read_cluster(cluster),
        job=Job(global_batch=batch, seq_length=length),
        target=Target(target),
    )
    found: list[Tradeoff] = []
    one = cpu(lambda: run(request))
    whole = cpu(lambda: found.append(against_memory(request, count=count)), repeats=1)
    points = found[0].points
    each = whole / len(points) / one
    print(
        f"\n{model} {cluster} {target}: a plan {one:.2f} s, {len(points)} points "
        f"({sum(point.dominated for point in points)} beaten when simulated) {whole:.2f} s, {each:.2f} plans a point"
    )
    assert each <= 5
