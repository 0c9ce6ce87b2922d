"""The event simulation against closed forms and against a simulation in discrete events that shares nothing with it."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.oracle import partitions, problems
from uniap_tune.problem import Assignment, Problem, evaluate
from uniap_tune.schedule import Schedule, chunks_in_flight
from uniap_tune.simulate import Run, StageTimes, recompute, simulate

GPIPE, ONE_F_ONE_B = Schedule.GPIPE, Schedule.ONE_F_ONE_B
durations = st.floats(0.001, 10.0)


def uniform(pp: int, forward: float, backward: float, link: float = 0.0) -> list[StageTimes]:
    return [StageTimes(forward, backward, link)] * pp


@given(
    pp=st.integers(1, 9),
    c=st.integers(1, 20),
    forward=durations,
    backward=durations,
    schedule=st.sampled_from(list(Schedule)),
)
def test_uniform_stages_without_links(pp: int, c: int, forward: float, backward: float, schedule: Schedule) -> None:
    run = simulate(uniform(pp, forward, backward), c, schedule)
    assert run.seconds == pytest.approx((c + pp - 1) * (forward + backward), rel=1e-12)


@given(pp=st.integers(2, 5), groups=st.integers(1, 4), v=st.integers(2, 4), forward=durations, backward=durations)
def test_interleaved_uniform_stages(pp: int, groups: int, v: int, forward: float, backward: float) -> None:
    """arXiv 2104.04473 section 2.2: the bubble is 1/v as long."""
    c = groups * pp
    run = simulate(uniform(pp, forward, backward), c, virtual_stages=v)
    assert run.seconds == pytest.approx((c + (pp - 1) / v) * (forward + backward), rel=1e-12)


def test_two_stages_by_hand() -> None:
    """Stage 0: F1 F2 B1 B2; stage 1: F1 B1 F2 B2; forward 1, backward 2, link 0.5."""
    run = simulate(uniform(2, 1.0, 2.0, 0.5), 2)
    # F1 on stage 1 at 1.5-2.5, B1 2.5-4.5, F2 4.5-5.5, B2 5.5-7.5; stage 0: B1 5-7, B2 8-10
    assert run.seconds == pytest.approx(10.0)
    assert run.busy == pytest.approx((6.0, 6.0))


@given(pp=st.integers(1, 8), c=st.integers(1, 16))
def test_micro_batches_held(pp: int, c: int) -> None:
    """1F1B holds min(c, pp - i) on stage i, GPipe all."""
    stages = uniform(pp, 1.0, 2.0)
    assert simulate(stages, c).most_held == tuple(min(c, pp - i) for i in range(pp))
    assert simulate(stages, c, GPIPE).most_held == (c,) * pp


@given(pp=st.integers(2, 5), groups=st.integers(1, 4), v=st.integers(2, 4))
def test_chunks_held_by_interleaving(pp: int, groups: int, v: int) -> None:
    run = simulate(uniform(pp, 1.0, 2.0), groups * pp, virtual_stages=v)
    expected = tuple(sum(chunks_in_flight(i, pp, groups * pp, v)) for i in range(pp))
    assert run.most_held == expected


stage_lists = st.lists(
    st.builds(StageTimes, durations, durations, st.sampled_from([0.0, 0.01, 0.3, 5.0])), min_size=1, max_size=6
)


@settings(deadline=None)
@given(stages=stage_lists, c=st.integers(1, 9), schedule=st.sampled_from(list(Schedule)))
def test_equals_discrete_events(stages: list[StageTimes], c: int, schedule: Schedule) -> None:
    run = simulate(stages, c, schedule)
    assert run.seconds == pytest.approx(by_events(stages, c, schedule), rel=1e-12)
    check_limits(run, stages, c)


def check_limits(run: Run, stages: list[StageTimes], c: int) -> None:
    """No step is faster than its busiest stage or than one micro-batch alone."""
    assert run.busy == pytest.approx(tuple(c * (s.forward + s.backward) for s in stages))
    assert run.seconds >= max(run.busy) * (1 - 1e-12)
    alone = sum(s.forward + s.backward for s in stages) + 2 * sum(s.link for s in stages[:-1])
    assert run.seconds >= alone * (1 - 1e-12)


def by_events(stages: list[StageTimes], c: int, schedule: Schedule) -> float:
    """A clock, stages that take the next pass of their list when they are free and its input has come, messages."""
    pp = len(stages)
    lists: list[list[tuple[str, int]]] = []
    for i in range(pp):
        ahead = c if schedule is GPIPE else min(c, pp - 1 - i)
        todo = [("F", m) for m in range(ahead)]
        for m in range(c - ahead):
            todo += [("F", ahead + m), ("B", m)]
        todo += [("B", m) for m in range(c - ahead, c)]
        lists.append(todo)
    arrived = {(0, "F", m) for m in range(c)}
    idle = [True] * pp
    events: list[tuple[float, int, str, int, str, int]] = []  # time, order, what, stage, kind, micro-batch
    clock, number = 0.0, 0

    def start_what_can() -> None:
        nonlocal number
        for i in range(pp):
            if idle[i] and lists[i] and (i, *lists[i][0]) in arrived:
                kind, m = lists[i].pop(0)
                idle[i] = False
                work = stages[i].forward if kind == "F" else stages[i].backward
                number += 1
                heapq.heappush(events, (clock + work, number, "done", i, kind, m))

    start_what_can()
    while events:
        clock, _, what, i, kind, m = heapq.heappop(events)
        if what == "arrive":
            arrived.add((i, kind, m))
        else:
            idle[i] = True
            if kind == "F" and i < pp - 1:
                number += 1
                heapq.heappush(events, (clock + stages[i].link, number, "arrive", i + 1, "F", m))
            elif kind == "F":
                arrived.add((i, "B", m))
            elif i > 0:
                number += 1
                heapq.heappush(events, (clock + stages[i - 1].link, number, "arrive", i - 1, "B", m))
        start_what_can()
    assert not any(lists)
    return clock


@given(stages=stage_lists, c=st.integers(1, 6), index=st.integers(0, 5), extra=st.floats(0.01, 2.0))
def test_slower_stages_or_links_never_make_a_step_faster(
    stages: list[StageTimes], c: int, index: int, extra: float
) -> None:
    before = simulate(stages, c).seconds
    i = index % len(stages)
    slower = StageTimes(stages[i].forward + extra, stages[i].backward, stages[i].link + extra)
    assert simulate([*stages[:i], slower, *stages[i + 1 :]], c).seconds >= before * (1 - 1e-12)


def test_a_schedule_that_deadlocks_is_refused() -> None:
    with pytest.raises(ValueError, match="deadlock"):
        simulate(uniform(4, 1.0, 1.0), 6, virtual_stages=2)


def test_gpipe_is_never_interleaved() -> None:
    with pytest.raises(ValueError, match="deadlock"):
        simulate(uniform(2, 1.0, 1.0), 4, GPIPE, virtual_stages=2)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(), data=st.data())
def test_recomputation_agrees_with_evaluation(problem: Problem, data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from(list(partitions(problem.num_layers, problem.num_stages))))
    strategy = tuple(data.draw(st.integers(0, t.num_strategies - 1)) for t in problem.layers)
    assignment = Assignment(tuple(stage), strategy)
    value, again = evaluate(problem, assignment), recompute(problem, assignment)
    assert again.objective_s == pytest.approx(value.objective_s, rel=1e-12, abs=1e-300)
    assert again.stage_bytes == pytest.approx(value.stage_bytes, rel=1e-12)
    limit = problem.memory_limit_bytes
    clear = [abs(size - limit) > 1e-9 * limit for size in value.stage_bytes]
    if all(clear):
        assert again.feasible == all(problem.fits(size) for size in value.stage_bytes)


@pytest.mark.parametrize("stage", [(0, 1, 0), (1, 1, 1), (0, 0, 0), (0, 0, 2), (0, 2, 1)])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(max_layers=3).filter(lambda p: (p.num_layers, p.num_stages) in ((3, 2), (3, 3))))
def test_stages_out_of_order_are_not_feasible(stage: tuple[int, ...], problem: Problem) -> None:
    if max(stage) < problem.num_stages:
        assert not recompute(problem, Assignment(stage, (0, 0, 0))).feasible
