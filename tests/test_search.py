"""The whole search against brute force over everything its space allows, and its certificate."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.oracle import brute_force
from tests.tiny import Tiny, tiny
from uniap_tune.bounds import ChainBounds
from uniap_tune.deadline import Deadline
from uniap_tune.problem import Problem, Solution, Status, evaluate, is_valid
from uniap_tune.quick import QuickBounds
from uniap_tune.search import TIE, Outcome, Progress, SearchOptions, SearchResult, search
from uniap_tune.simulate import recompute
from uniap_tune.solvers import Solve, solver_named
from uniap_tune.strategy import Target

# Where between the least and the most memory any family needs the limit lies; below 0 nothing fits.
LIMITS = (-0.01, 0.0, 0.03, 0.1, 0.2, 0.35, 0.6, 1.0)


def at_limit(job: Tiny, part: float) -> Tiny:
    """The job with a memory limit at this part of the way from the leanest to the greediest family."""
    least, most = job.peaks()
    return job.with_limit(least + part * (most - least))


def check(job: Tiny, result: SearchResult) -> None:
    """The result is the optimum of everything there is, and its certificate is true for every pair."""
    truth = job.best_by_pair()
    best = min(truth.values())
    assert {(pair.pp, pair.num_microbatches) for pair in result.pairs} == set(truth)
    for pair in result.pairs:
        value = truth[pair.pp, pair.num_microbatches]
        assert pair.bound_s <= value * (1 + TIE), pair
        if pair.outcome is Outcome.INFEASIBLE:
            assert math.isinf(value), pair
        else:
            assert pair.bound_s >= best * (1 - TIE), pair
        if pair.outcome is Outcome.SOLVED:
            assert pair.objective_s is not None
            assert pair.objective_s >= value * (1 - TIE)
    if math.isinf(best):
        assert result.status is Status.INFEASIBLE
        assert not result.candidates
        return
    assert result.status is Status.OPTIMAL
    winner = result.candidates[0]
    assert winner.objective_s == pytest.approx(best, rel=2e-9)
    assert result.bound_s <= winner.objective_s
    assert result.gap <= 2e-9
    for candidate in result.candidates:
        problem = candidate.formulation.problem
        again = recompute(problem, candidate.assignment)
        assert again.feasible
        assert is_valid(problem, candidate.assignment)
        if problem.virtual_stages == 1:
            assert again.objective_s == pytest.approx(candidate.objective_s, rel=1e-12)
        else:
            assert again.objective_s <= candidate.objective_s * (1 + 1e-12)


UNIFORM = {
    "2 devices": {"cluster": "1x2:a100-80gb", "num_layers": 2, "global_batch": 4},
    "4 devices": {"cluster": "1x4:a100-80gb", "num_layers": 4, "global_batch": 4},
    "2 nodes": {"cluster": "2x2:l4", "num_layers": 3, "global_batch": 4},
    "large ends": {"cluster": "1x4:a100-80gb", "num_layers": 4, "global_batch": 8, "vocab_size": 50000},
    "long": {"cluster": "1x2:a100-80gb", "num_layers": 3, "global_batch": 2, "seq_length": 16384},
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("case", UNIFORM)
@pytest.mark.parametrize("target", [Target.MEGATRON, Target.DEEPSPEED])
def test_uniform_targets_reach_the_optimum_of_everything(target: Target, case: str, limit: float) -> None:
    job = at_limit(tiny(target, **UNIFORM[case]), limit)  # type: ignore[arg-type]
    check(job, search(job.space, job.pricer))


@pytest.mark.parametrize("limit", [-0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    "case",
    [
        {"cluster": "1x2:a100-80gb", "num_layers": 2, "global_batch": 2, "maximum": ("zero=2",)},
        {"cluster": "1x4:l4", "num_layers": 2, "global_batch": 2, "maximum": ("zero=1", "dp=2")},
    ],
    ids=["2 devices", "4 devices"],
)
def test_free_target_reaches_the_optimum_of_everything(case: dict[str, object], limit: float) -> None:
    job = at_limit(tiny(Target.ANY, **case), limit)  # type: ignore[arg-type]
    check(job, search(job.space, job.pricer))


@pytest.mark.parametrize("solver", ["highs", "cbc"])
@pytest.mark.parametrize("limit", [-0.01, 0.1, 1.0])
def test_solvers_agree(solver: str, limit: float) -> None:
    job = at_limit(tiny(Target.MEGATRON, num_layers=2, global_batch=2), limit)
    check(job, search(job.space, job.pricer, SearchOptions(solve=solver_named(solver), solver=solver)))


def test_leading_recompute_wins_where_memory_is_between_none_and_full() -> None:
    """Recomputing some blocks of a stage beats recomputing all, and the search finds how many."""
    job = tiny(Target.MEGATRON, cluster="1x1:a100-80gb", num_layers=4, global_batch=4, seq_length=2048, fix=("mbs=4",))
    none, full = (next(p for *_, f, p in job.problems() if f.name == f"tp1 dp1 z0{name}") for name in ("", " rc-full"))
    least, most = (search_peak(problem) for problem in (full, none))
    found = search(job.space, (job.with_limit(least + 0.5 * (most - least))).pricer).candidates[0]
    marks = [s[k].recompute for s, k in zip(found.formulation.strategies, found.assignment.strategy, strict=True)]
    assert found.family.leading
    assert 0 < marks.count(marks[1]) < 4 + 2
    assert marks[1] == "full"
    assert marks[4] == "none"


def search_peak(problem: Problem) -> float:
    """Bytes of the only stage of a problem with one strategy a layer."""
    held = sum(float(t.bytes_in_flight(1)[0]) for t in problem.layers)
    return held + max(float(t.transient_bytes[0]) for t in problem.layers)


def test_more_leading_blocks_may_be_better_than_the_fewest_that_fit() -> None:
    """The fewest recomputed blocks that fit may allow lopsided cuts only; one more may allow the balanced one."""
    job = tiny(
        Target.MEGATRON,
        num_layers=6,
        hidden_size=1024,
        vocab_size=128000,
        cluster="1x8:a100-80gb",
        global_batch=16,
        seq_length=2048,
        fix=("tp=1", "zero=0", "pp=2"),
    )
    for part in (0.0, 0.02, 0.05, 0.08, 0.11, 0.14, 0.17, 0.2, 0.3):
        limited = at_limit(job, part)
        check(limited, search(limited.space, limited.pricer))


@pytest.mark.parametrize("top", [1, 2, 5])
def test_top_are_the_best_different_plans(top: int) -> None:
    job = at_limit(tiny(Target.MEGATRON, cluster="1x4:a100-80gb", num_layers=2, global_batch=4), 0.2)
    by_family: dict[tuple[int, int, str], float] = {}
    for pp, c, family, problem in job.problems():
        key = (pp, c, family.grid)
        by_family[key] = min(by_family.get(key, math.inf), job.least(pp, c, family, problem))
    expected = sorted(value for value in by_family.values() if math.isfinite(value))[:top]
    found = search(job.space, job.pricer, SearchOptions(top=top)).candidates
    assert len({candidate.key for candidate in found}) == len(found)
    assert [c.objective_s for c in found[:top]] == pytest.approx(expected, rel=2e-9)


def test_quick_bound_is_a_bound() -> None:
    for target in (Target.MEGATRON, Target.DEEPSPEED):
        for part in (0.05, 0.4, 1.0):
            job = at_limit(tiny(target, cluster="1x4:a100-80gb", num_layers=3, global_batch=4, vocab_size=30000), part)
            bounds = QuickBounds(job.pricer)
            for pp, c, family, problem in job.problems():
                assert bounds(pp, c, family) <= brute_force(problem) * (1 + 1e-12)


def test_two_searches_are_equal() -> None:
    runs = []
    for _ in range(2):
        job = at_limit(tiny(Target.ANY, maximum=("zero=1",), num_layers=3), 0.3)
        result = search(job.space, job.pricer, SearchOptions(top=3))
        runs.append((result.pairs, [(c.key, c.assignment, c.objective_s) for c in result.candidates], result.bound_s))
    assert runs[0] == runs[1]


def test_ties_go_to_the_simpler_plan() -> None:
    """On one device ZeRO and degrees mean nothing; with recompute free of charge nobody would recompute."""
    job = tiny(Target.ANY, cluster="1x1:a100-80gb", num_layers=3, global_batch=4)
    found = search(job.space, job.pricer).candidates[0]
    assert found.pp == 1
    assert found.simplicity[:3] == (1, 0, 0)


def test_progress_is_told() -> None:
    seen: list[Progress] = []
    job = at_limit(tiny(Target.MEGATRON), 0.3)
    result = search(job.space, job.pricer, SearchOptions(notify=seen.append))
    assert seen
    best = result.candidates[0].objective_s
    assert all(progress.bound_s <= best * (1 + TIE) for progress in seen)
    assert all(a.incumbent_s >= b.incumbent_s for a, b in pairwise(seen))
    assert [p.solved for p in seen] == sorted(p.solved for p in seen)


def test_deadline_in_the_past_claims_nothing() -> None:
    job = at_limit(tiny(Target.MEGATRON, num_layers=4, cluster="1x4:a100-80gb"), 0.3)
    result = search(job.space, job.pricer, SearchOptions(deadline=Deadline(at=0.0)))
    best = min(job.best_by_pair().values())
    assert result.status in (Status.LIMIT, Status.OPTIMAL)
    assert result.bound_s <= best * (1 + TIE)
    if result.candidates:
        assert result.candidates[0].objective_s >= best * (1 - TIE)


def interrupted(after: int) -> Solve:
    """A solver during whose call number ``after`` (from 0) Ctrl-C is pressed."""
    honest, calls = solver_named(), [0]

    def solve(problem: Problem, cutoff: float, deadline: Deadline, bounds: ChainBounds) -> Solution:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return honest(problem, cutoff, deadline, bounds)

    return solve


def test_ctrl_c_keeps_a_true_bound() -> None:
    """Wherever the search is interrupted, what is left open stays open in the certificate."""
    several = tiny(Target.MEGATRON, num_layers=4, cluster="1x4:a100-80gb")
    single = tiny(Target.MEGATRON, fix=("pp=1", "tp=1", "zero=0", "recompute=none", "microbatches=1"))
    for job, limit, after in [(single, 1.0, 0), *((several, limit, n) for limit in (0.1, 1.0) for n in range(4))]:
        limited = at_limit(job, limit)
        result = search(limited.space, limited.pricer, SearchOptions(solve=interrupted(after), top=5))
        truth = limited.best_by_pair()
        best = min(truth.values())
        assert result.bound_s <= best * (1 + TIE)
        for pair in result.pairs:
            assert pair.bound_s <= truth[pair.pp, pair.num_microbatches] * (1 + TIE), pair
        if result.status is Status.OPTIMAL:
            assert result.candidates[0].objective_s == pytest.approx(best, rel=2e-9)


def test_a_candidate_says_what_it_is() -> None:
    job = at_limit(tiny(Target.MEGATRON), 0.3)
    found = search(job.space, job.pricer).candidates[0]
    value = evaluate(found.formulation.problem, found.assignment)
    assert value.objective_s == found.objective_s
    assert all(found.formulation.problem.fits(size) for size in value.stage_bytes)
    assert replace(found, objective_s=1.0).key == found.key
