"""CPU seconds of full proven searches and of hard single problems, with the limits they must stay under.

Run with ``pytest -o python_files='bench_*.py' -o python_functions='bench_*' tests/benchmarks -s``. Times are medians of
three on one core.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import pytest

from tests.benchmarks import instances
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.bounds import chain_bounds
from uniap_tune.chain import solve_chain
from uniap_tune.deadline import Deadline
from uniap_tune.planner import Request, build
from uniap_tune.problem import Problem, Status
from uniap_tune.search import SearchResult, search
from uniap_tune.spec import Job
from uniap_tune.strategy import Target

GIB = 1 << 30

# model, cluster, global batch, sequence length, most CPU seconds of the search (prices known)
JOBS = [
    ("llama-2-7b", "1x8:a100-80gb", 128, 4096, 0.5),
    ("llama-3-70b", "8x8:h100", 128, 8192, 3.0),
    ("llama-3-70b", "32x8:h100", 512, 8192, 3.0),
    ("gpt-3-175b", "128x8:a100-80gb", 1536, 2048, 2.0),
    ("gpt-1t", "384x8:a100-80gb", 3072, 2048, 5.0),
    ("mixtral-8x7b", "8x8:h100", 256, 4096, 8.0),
    ("deepseek-v3", "256x8:h100", 8192, 4096, 40.0),  # of the free space; megatron takes 2
]


def cpu(task: Callable[[], object], repeats: int = 3) -> float:
    """Median CPU seconds of a task."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        task()
        times.append(time.process_time() - started)
    return statistics.median(times)


@pytest.mark.parametrize("target", ["any", "megatron"])
@pytest.mark.parametrize(("model", "cluster", "batch", "length", "most"), JOBS)
def bench_full_search(model: str, cluster: str, batch: int, length: int, most: float, target: str) -> None:
    request = Request(
        model=read_model(model),
        cluster=read_cluster(cluster),
        job=Job(global_batch=batch, seq_length=length),
        target=Target(target),
    )
    results: list[SearchResult] = []
    started = time.process_time()
    space, pricer = build(request)
    results.append(search(space, pricer))  # prices every layer on the way
    first = time.process_time() - started
    seconds = cpu(lambda: results.append(search(space, pricer)))
    assert results[-1].status is Status.OPTIMAL
    assert results[-1].gap <= 1e-4
    pricing = max(0.0, first - seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"\n{model} {cluster} {target}: search {seconds:.2f} s, pricing {pricing:.2f} s, peak RSS {peak:.2f} GiB")
    assert seconds <= most
    assert pricing <= 2.0
    assert peak < 1.0


@pytest.mark.parametrize(
    ("name", "make", "most"),
    [
        ("48 different layers", lambda stages, c: instances.swin_like(stages, c=c), 2.0),
        ("encoder-decoder", lambda stages, c: instances.t5_like(stages, c=c), 5.0),
    ],
)
def bench_outer_search(name: str, make: Callable[[int, int], Problem], most: float) -> None:
    """Every (stages, micro-batches) on 32 devices: bounds first, then best first with the incumbent as cut-off."""
    problems = instances.outer(make, 32, 64)

    def best() -> float:
        bounded = sorted(((chain_bounds(p), p) for p in problems), key=lambda item: item[0].total)
        found = float("inf")
        for bounds, problem in bounded:
            if bounds.total < found:
                solution = solve_chain(problem, cutoff=found, bounds=bounds)
                found = min(found, solution.objective_s)
        return found

    seconds = cpu(best)
    print(f"\n{name}, {len(problems)} pairs: {seconds:.2f} s")
    assert seconds <= most


SINGLE = [
    ("swin-like, 48 layers, 8 stages", lambda: instances.swin_like(), 10.0),
    ("t5-like, 50 layers, 8 stages", lambda: instances.t5_like(), 10.0),
    *[(f"equal layers, {n}, 8 stages", lambda n=n: instances.equal_layers(n, 8, 24), 60.0) for n in (32, 64, 128, 256)],
    *[(f"all different, {n}, 8 stages", lambda n=n: instances.all_different(n, 8, 16), 60.0) for n in (32, 64)],
    *[(f"strategies, {k}", lambda k=k: instances.equal_layers(66, 8, k), 60.0) for k in (8, 16, 32, 64)],
    *[(f"stages, {s}", lambda s=s: instances.equal_layers(130, s, 16), 60.0) for s in (1, 2, 8, 32, 128)],
]


@pytest.mark.parametrize(("name", "make", "limit"), SINGLE, ids=[name for name, _, _ in SINGLE])
def bench_single_problem(name: str, make: Callable[[], Problem], limit: float) -> None:
    problem = make()
    started = time.process_time()
    solution = solve_chain(problem, deadline=Deadline.after(limit))
    seconds = time.process_time() - started
    print(f"\n{name}: {solution.status}, gap {solution.gap:.1e}, {seconds:.2f} s")
    assert solution.assignment is not None
