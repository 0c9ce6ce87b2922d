"""The second pass: simpler strategies where they cost nothing, and never at any price."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, assume, given, settings

from tests.oracle import brute_force, problems
from uniap_tune.chain import solve_chain
from uniap_tune.problem import Assignment, LayerTable, Problem, evaluate, is_valid
from uniap_tune.schedule import Schedule
from uniap_tune.ties import simplify


def table(time: list[float], size: list[float], layout: list[int] | None = None) -> LayerTable:
    zeros = np.zeros(len(time))
    return LayerTable(
        layout=np.array(layout or [0] * len(time)),
        time_s=np.array(time),
        step_time_s=zeros,
        static_bytes=np.array(size),
        microbatch_bytes=zeros,
        transient_bytes=zeros,
        step_bytes=zeros,
    )


def chain(layers: list[LayerTable], limit: float, stages: int = 1, c: int = 4) -> Problem:
    return Problem(stages, c, Schedule.ONE_F_ONE_B, limit, 2, tuple(layers), ())


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True))
def test_keeps_the_optimum_and_every_constraint(problem: Problem) -> None:
    found = solve_chain(problem).assignment
    assume(found is not None)
    assert found is not None
    simpler = simplify(problem, found)
    value = evaluate(problem, simpler)
    assert value.objective_s <= brute_force(problem) * (1 + 2e-9)
    assert is_valid(problem, simpler)
    assert all(problem.fits(size) for size in value.stage_bytes)
    assert simpler.stage == found.stage
    assert sum(simpler.strategy) <= sum(found.strategy)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_is_idempotent_on_graphs(problem: Problem) -> None:
    start = Assignment(
        tuple(sorted(min(u, problem.num_stages - 1) for u in range(problem.num_layers))),
        tuple(t.num_strategies - 1 for t in problem.layers),
    )
    once = simplify(problem, start)
    assert evaluate(problem, once).objective_s <= evaluate(problem, start).objective_s * (1 + 1e-9)
    assert once.stage == start.stage


def test_takes_the_simplest_of_equal_strategies() -> None:
    problem = chain([table([1.0, 1.0, 1.0], [5.0, 3.0, 1.0])], limit=5.0)
    assert simplify(problem, Assignment((0,), (2,))).strategy == (0,)


def test_leaves_what_memory_forbids() -> None:
    problem = chain([table([1.0, 1.0, 1.0], [5.0, 3.0, 1.0])], limit=4.0)
    assert simplify(problem, Assignment((0,), (2,))).strategy == (1,)


def test_leaves_what_would_be_slower() -> None:
    problem = chain([table([1.001, 1.0], [1.0, 1.0])], limit=4.0)
    assert simplify(problem, Assignment((0,), (1,))).strategy == (1,)


def test_a_strategy_off_the_critical_stage_costs_time_all_the_same() -> None:
    slow, quick = table([3.0], [0.0]), table([1.5, 1.0], [0.0, 0.0])
    problem = chain([slow, quick], limit=1.0, stages=2)
    assert simplify(problem, Assignment((0, 1), (0, 1))).strategy == (0, 1)


def test_orders_equal_layers() -> None:
    layer = table([2.0, 1.0], [0.0, 1.0])
    problem = chain([layer] * 4, limit=2.0)
    assert simplify(problem, Assignment((0,) * 4, (1, 0, 1, 0))).strategy == (0, 0, 1, 1)


def test_does_not_reorder_over_layouts_stages_or_kinds() -> None:
    layer = table([2.0, 1.0], [0.0, 1.0], layout=[0, 1])
    assert simplify(chain([layer] * 4, limit=2.0), Assignment((0,) * 4, (1, 0, 1, 0))).strategy == (1, 0, 1, 0)
    layer = table([2.0, 1.0], [0.0, 1.0])
    problem = chain([layer] * 4, limit=1.0, stages=2)
    assert simplify(problem, Assignment((0, 0, 1, 1), (1, 0, 1, 0))).strategy == (0, 1, 0, 1)
    other = table([2.0, 1.0], [0.0, 1.0])
    assert simplify(chain([layer, other], limit=1.0), Assignment((0, 0), (1, 0))).strategy == (1, 0)
