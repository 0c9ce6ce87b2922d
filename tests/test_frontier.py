"""Frontiers against the Pareto set of all plans, enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import cost, cuts, in_flight, partitions, problems
from tests.tiny import UNLIMITED, Tiny, tiny
from uniap_tune.cost.model import CostModel
from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.formulate import Pricer
from uniap_tune.frontier.branches import branches, places
from uniap_tune.frontier.epsilon import Branch, EpsilonSearch, Found
from uniap_tune.frontier.points import Frontier, below, fastest_point, leanest_point
from uniap_tune.graph import build_graph
from uniap_tune.problem import LayerTable, Problem, Schedule, evaluate, is_valid
from uniap_tune.replay import judged_seconds
from uniap_tune.search import TIE
from uniap_tune.solvers import solve_interleaved
from uniap_tune.space import Family
from uniap_tune.spec import Moe
from uniap_tune.strategy import Target

# A plan as the frontier sees it: seconds, bytes.
Value = tuple[float, float]


def peak(problem: Problem, stage: Sequence[int], choice: Sequence[int]) -> float:
    """Bytes of the fullest stage, by the definition."""
    parts, c, v = problem.num_stages, problem.num_microbatches, problem.virtual_stages
    most = 0.0
    for i in range(parts):
        held = spike = update = 0.0
        for u, table in enumerate(problem.layers):
            if stage[u] % parts == i:
                k = choice[u]
                flying = c if problem.schedule == "gpipe" else min(c, parts - i)
                if v > 1:
                    flying = in_flight(parts, c, v)[stage[u]]
                held += table.static_bytes[k] + flying * table.microbatch_bytes[k]
                update += table.static_bytes[k] + table.step_bytes[k]
                spike = max(spike, table.transient_bytes[k])
        most = max(most, held + spike, update)
    return float(most)


def plans(problem: Problem) -> list[Value]:
    """Seconds and bytes of every plan within the limit."""
    free = replace(problem, memory_limit_bytes=math.inf)
    found = []
    any_cut = partitions(problem.num_layers, problem.num_stages)
    for stage in cuts(problem) if problem.virtual_stages > 1 else any_cut:
        for choice in itertools.product(*(range(len(t.time_s)) for t in problem.layers)):
            size = peak(problem, stage, choice)
            if size <= problem.memory_limit_bytes * (1 + 1e-12):
                seconds = cost(free, stage, choice)
                if math.isfinite(seconds):
                    found.append((seconds, size))
    return found


def plans_of(job: Tiny, pp: int, c: int, family: Family, problem: Problem) -> list[Value]:
    """Every plan; with virtual stages the one that stands for all under each limit, as it is judged."""
    found = plans(problem)
    if problem.virtual_stages == 1:
        return found
    leading = problem.leading.count if problem.leading is not None else 0
    made, judged = job.pricer.formulate(pp, c, family, leading=leading), []
    for size in sorted({size for _, size in found}):
        cut = solve_interleaved(replace(problem, memory_limit_bytes=size)).assignment
        if cut is not None:
            judged.append((judged_seconds(made, cut), max(evaluate(problem, cut).stage_bytes)))
    return judged


def pareto_set(values: list[Value]) -> list[Value]:
    """The values that none dominates, fastest first; those within a tie of each other are one."""
    kept: list[Value] = []
    for seconds, size in sorted(values, key=lambda value: value[1]):  # leanest first
        if kept and seconds >= kept[-1][0] * (1 - TIE):
            continue
        if kept and size <= kept[-1][1] * (1 + TIE):
            kept.pop()
        kept.append((seconds, size))
    return kept[::-1]


def search_of(family: Sequence[Problem]) -> EpsilonSearch:
    return EpsilonSearch([Branch(lambda _, problem=problem: problem) for problem in family])


def values(points: Sequence[Found]) -> list[Value]:
    return [(point.objective_s, point.peak_bytes) for point in points]


def same(found: Sequence[Value], expected: Sequence[Value]) -> bool:
    return len(found) == len(expected) and all(
        a == pytest.approx(b, rel=3 * TIE, abs=0) for a, b in zip(found, expected, strict=True)
    )


def check_points(points: Sequence[Found], family: Sequence[Problem]) -> None:
    """Points are plans, as they say they are."""
    for point in points:
        problem = family[point.branch]
        again = evaluate(problem, point.assignment)
        assert is_valid(problem, point.assignment)
        assert again.objective_s == point.objective_s
        assert max(again.stage_bytes) == point.peak_bytes
        assert point.objective_s * (1 - 2 * TIE) <= point.bound_s <= point.objective_s * (1 + TIE)


@st.composite
def families(draw: st.DrawFn) -> list[Problem]:
    """One job on several pipelines: the same layers, other numbers of stages and micro-batches."""
    base = draw(problems(chain=draw(st.sampled_from([True, True, True, False])), max_layers=3))
    wider = draw(st.sampled_from([1.0, 1.5, 4.0]))
    sizes = draw(st.lists(st.integers(1, min(3, base.num_layers)), min_size=1, max_size=3))
    counts = draw(st.lists(st.sampled_from([1, 2, 5, 64]), min_size=len(sizes), max_size=len(sizes)))
    return [
        replace(base, num_stages=n, num_microbatches=c, memory_limit_bytes=wider * base.memory_limit_bytes)
        for n, c in zip(sizes, counts, strict=True)
    ]


@given(families())
@settings(max_examples=150, deadline=None)
def test_every_point_is_found_and_no_other(family: list[Problem]) -> None:
    expected = pareto_set([value for problem in family for value in plans(problem)])
    frontier = Frontier(search_of(family), family[0].memory_limit_bytes)
    in_order = list(frontier.trace())
    assert frontier.complete
    assert in_order == frontier.points
    check_points(in_order, family)
    assert same(values(in_order), expected)


@given(families(), st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_spread_points_are_points_with_both_ends(family: list[Problem], count: int) -> None:
    expected = pareto_set([value for problem in family for value in plans(problem)])
    frontier = Frontier(search_of(family), family[0].memory_limit_bytes)
    found = list(frontier.spread(count))
    points = frontier.points
    assert len(points) == len(found) == min(count, len(expected))
    assert len(points) == len(expected) if frontier.complete else len(points) == count
    check_points(points, family)
    if expected:
        matching = [[value for value in expected if same(values([point]), [value])] for point in points]
        assert all(len(match) == 1 for match in matching)
        assert same([match[0] for match in matching], [value for value in expected if [value] in matching])
        assert same(values(points[:1]), expected[:1])
        assert same(values(points[-1:]), expected[-1:])


@given(families(), st.lists(st.floats(0.0, 1.1), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_order_of_questions_does_not_matter(family: list[Problem], parts: list[float]) -> None:
    """What is kept from one limit is never wrong at another, larger or smaller."""
    limit = family[0].memory_limit_bytes
    everything = [value for problem in family for value in plans(problem)]
    search = search_of(family)
    for part in parts:
        asked = min(part, 1.0) * limit
        fitting = [seconds for seconds, size in everything if size <= asked * (1 + 1e-12)]
        found = search.fastest(asked)
        if found is None:
            assert not fitting
        else:
            assert found.objective_s == pytest.approx(min(fitting), rel=3 * TIE, abs=0)
            assert found.peak_bytes <= asked * (1 + 1e-12)


def with_experts(job: Tiny) -> Tiny:
    """The job for a model of which only some layers have experts."""
    moe = Moe(num_experts=8, top_k=2, expert_ffn_size=512, first_dense_layers=2)
    space = replace(job.space, model=replace(job.space.model, moe=moe))
    costs = CostModel(space.model, space.cluster, space.job, space.capabilities)
    return Tiny(space, Pricer(build_graph(space.model), costs, space.job.global_batch, UNLIMITED))


JOBS = {
    "megatron": tiny(Target.MEGATRON, num_layers=3, cluster="1x2:a100-80gb", global_batch=4, seq_length=2048),
    "virtual stages": tiny(Target.MEGATRON, num_layers=4, cluster="1x2:a100-80gb", global_batch=4, fix=("pp=2",)),
    "block recompute": tiny(
        Target.MEGATRON, num_layers=6, cluster="1x1:a100-80gb", global_batch=2, seq_length=4096, fix=("mbs=2",)
    ),
    "lopsided cuts": tiny(
        Target.MEGATRON,
        num_layers=6,
        hidden_size=1024,
        vocab_size=128000,
        cluster="1x8:a100-80gb",
        global_batch=16,
        seq_length=2048,
        fix=("tp=1", "zero=0", "pp=2"),
    ),
    "experts": with_experts(tiny(Target.MEGATRON, num_layers=5, fix=("pp=2",))),
    "deepspeed": tiny(Target.DEEPSPEED, num_layers=3, cluster="1x4:a100-80gb", global_batch=4),
    "any": tiny(Target.ANY, num_layers=2, cluster="1x2:a100-80gb", global_batch=2, maximum=("zero=1",)),
}


def searched(job: Tiny) -> EpsilonSearch:
    """The search of a job's whole space, with the bounds that prices alone give."""
    return EpsilonSearch(branches(places(job.space), job.pricer))


@pytest.mark.parametrize("name", JOBS)
def test_the_frontier_of_a_job_is_that_of_all_its_plans(name: str) -> None:
    job = JOBS[name]
    expected = pareto_set([value for place in job.problems() for value in plans_of(job, *place)])
    assert len(expected) > 1
    frontier = Frontier(searched(job), UNLIMITED)
    assert same(values(list(frontier.trace())), expected)
    some = Frontier(searched(job), UNLIMITED)
    assert len(list(some.spread(5))) == min(5, len(expected))
    assert same(values(some.points[:1] + some.points[-1:]), [expected[0], expected[-1]])


def test_what_is_proven_is_not_solved_again() -> None:
    """Between a plan's peak and the limit it was found under nothing is solved, and nothing twice."""
    search = searched(JOBS["block recompute"])
    frontier = Frontier(search, UNLIMITED)
    points = list(frontier.trace())
    solved = search.solved
    assert values(list(Frontier(search, UNLIMITED).trace())) == values(points)
    for point, leaner in itertools.pairwise(points):
        again = search.fastest((point.peak_bytes + leaner.peak_bytes) / 2)
        assert again is not None
        assert again.objective_s == pytest.approx(leaner.objective_s, rel=3 * TIE)
    assert search.solved == solved


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_of_equally_fast_plans_the_leanest_is_a_point(seconds: float) -> None:
    table = LayerTable(
        layout=np.zeros(3, dtype=np.int64),
        time_s=np.full(3, seconds),
        step_time_s=np.zeros(3),
        static_bytes=np.array([5.0, 0.0, 2.0]),
        microbatch_bytes=np.zeros(3),
        transient_bytes=np.array([0.0, 1.0, 0.0]),
        step_bytes=np.zeros(3),
    )
    problem = Problem(1, 4, Schedule.ONE_F_ONE_B, 100.0, 1, (table, table), ())
    frontier = Frontier(search_of([problem]), 100.0)
    assert values(list(frontier.trace())) == [(8 * seconds, 1.0)]
    assert values(list(Frontier(search_of([problem]), 100.0).spread(4))) == [(8 * seconds, 1.0)]
    empty = replace(problem, layers=(replace(table, transient_bytes=np.zeros(3)),) * 2)
    assert values(list(Frontier(search_of([empty]), 100.0).trace())) == [(8 * seconds, 0.0)]


def test_the_end_of_the_frontier_is_the_leanest_plan() -> None:
    search = searched(JOBS["megatron"])
    point = leanest_point(search, UNLIMITED)
    assert point is not None
    assert search.fastest(below(point.peak_bytes)) is None
    assert point == fastest_point(search, point.peak_bytes)
    assert leanest_point(search, below(point.peak_bytes)) is None


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_points_found_before_the_time_is_over_are_points(steps: int) -> None:
    """Wherever the search is cut short, what it has is right."""
    job = JOBS["megatron"]
    expected = pareto_set([value for *_, problem in job.problems() for value in plans(problem)])
    search = searched(job)
    search.deadline = _Countdown(steps)
    frontier = Frontier(search, UNLIMITED)
    with pytest.raises(DeadlineError):
        list(frontier.trace())
    assert not frontier.complete
    assert same(values(frontier.points), expected[: len(frontier.points)])


class _Countdown(Deadline):
    """A deadline after so many looks at it."""

    __slots__ = ("left_over",)

    def __init__(self, steps: int) -> None:
        super().__init__()
        object.__setattr__(self, "left_over", [steps])

    def check(self) -> None:
        self.left_over[0] -= 1
        if self.left_over[0] < 0:
            raise DeadlineError
