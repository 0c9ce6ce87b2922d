"""Planning through the Python API: what is validated, what comes back, and that equal inputs give equal plans."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest

import uniap_tune
from tests.tiny import tiny_model
from uniap_tune.adapters.cluster import describe, read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.deadline import Deadline
from uniap_tune.errors import InfeasibleError, InputError, StoppedError, UnsupportedError
from uniap_tune.planner import (
    RERANK_GAP,
    Request,
    assumptions,
    build,
    certify,
    plan,
    run,
    validate,
)
from uniap_tune.problem import Status
from uniap_tune.space import Knobs, parse_knobs
from uniap_tune.spec import DType, Job, Moe, Position, Precision
from uniap_tune.strategy import Target

CLUSTER = read_cluster("1x4:a100-80gb")
JOB = Job(global_batch=16, seq_length=1024)


def request(**changes: object) -> Request:
    base = Request(model=tiny_model(4, hidden_size=512), cluster=CLUSTER, job=JOB)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_api() -> None:
    found = plan(tiny_model(4), CLUSTER, JOB, target="deepspeed")
    assert found.target is Target.DEEPSPEED
    assert found.status == "optimal"
    for _ in range(2):
        assert uniap_tune.plan(tiny_model(4), CLUSTER, JOB, target="deepspeed").to_json() == found.to_json()


def test_names_of_the_package_are_not_hidden_by_its_modules() -> None:
    for name in ("plan", "render"):
        import_module(f"uniap_tune.{name}")
        assert callable(getattr(uniap_tune, name))
    assert uniap_tune.plan is plan
    assert uniap_tune.Plan.__module__ == "uniap_tune.plan"
    assert all(hasattr(uniap_tune, name) for name in uniap_tune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = uniap_tune.fly


def test_api_takes_knobs_and_memory() -> None:
    knobs = Knobs(fix={"tp": "2", "zero": "1"})
    found = plan(tiny_model(4), CLUSTER, JOB, knobs=knobs, memory_fraction=0.5)
    assert {s.tp for s in found.strategies} == {2}
    assert {s.zero for s in found.strategies} == {1}
    assert found.memory_limit_bytes == 0.5 * CLUSTER.device.memory_bytes


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="jax"):
        plan(tiny_model(4), CLUSTER, JOB, target="jax")


def test_memory_limit() -> None:
    memory = CLUSTER.device.memory_bytes
    assert 0.7 * memory < request().memory_limit_bytes < memory
    careful = replace(CLUSTER, memory_fraction=0.8)
    assert request(cluster=careful).memory_limit_bytes == 0.8 * memory
    assert request(cluster=careful, memory_fraction=0.9).memory_limit_bytes == 0.9 * memory


def test_the_limit_of_layers_leaves_room_for_the_framework() -> None:
    asked = request()
    _, pricer = build(asked)
    assert pricer.limit_bytes == asked.memory_limit_bytes - pricer.costs.reserved_bytes()
    with pytest.raises(InputError, match="--memory-fraction"):
        build(request(memory_fraction=0.02))


def test_inputs_are_described_and_hashed() -> None:
    asked = request()
    inputs = asked.describe()
    json.dumps(inputs, allow_nan=False)
    assert inputs["cluster"] == describe(CLUSTER)
    assert inputs["model"]["num_layers"] == 4
    assert inputs["hash"] == request().describe()["hash"]
    changes: list[dict[str, object]] = [
        {"model": tiny_model(5, hidden_size=512)},
        {"cluster": read_cluster("1x4:a100-40gb")},
        {"job": Job(global_batch=32, seq_length=1024)},
        {"target": Target.DEEPSPEED},
        {"knobs": parse_knobs(["tp=1"], [], [])},
        {"knobs": parse_knobs([], ["tp=1"], [])},
        {"knobs": parse_knobs([], [], ["tp=1"])},
        {"memory_fraction": 0.9},
    ]
    hashes = {request(**change).describe()["hash"] for change in changes}
    assert len(hashes) == len(changes)
    assert inputs["hash"] not in hashes


def test_several_plans_best_first() -> None:
    planning = run(request(), top=4)
    assert len(planning.plans) == 4
    assert planning.plan is planning.plans[0]
    best = planning.result.candidates[0].objective_s
    assert planning.plan.objective_s <= best * (1 + RERANK_GAP)
    later = [p.objective_s for p in planning.plans if p.objective_s > best * (1 + RERANK_GAP)]
    assert later == sorted(later)
    assert len({p.to_json() for p in planning.plans}) == 4
    assert all(p.bound_s <= best for p in planning.plans)
    assert all(p.gap >= 0 for p in planning.plans)
    assert planning.plan.gap <= RERANK_GAP


def test_near_plans_are_ranked_by_their_simulated_step() -> None:
    """With a wide window the shortest simulated step comes first, and the gap says what that costs."""
    proven, simulated = run(request(), top=3), run(request(), top=3, near=0.2)
    assert simulated.plan.step_time_s <= proven.plan.step_time_s
    assert simulated.plan.objective_s <= 1.2 * proven.plan.objective_s
    assert simulated.plan.bound_s == pytest.approx(proven.plan.bound_s, rel=1e-3)
    steps = [p.step_time_s for p in simulated.plans if p.objective_s <= 1.2 * proven.plan.objective_s]
    assert steps == sorted(steps)


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_solvers_find_the_same_optimum(target: Target, solver: str) -> None:
    asked = request(target=target, job=Job(global_batch=4, seq_length=1024), knobs=parse_knobs([], ["zero=1"], []))
    own, other = run(asked), run(asked, solver=solver)
    assert other.result.candidates[0].objective_s == pytest.approx(own.result.candidates[0].objective_s, rel=1e-7)


def test_processes_find_the_same_plan() -> None:
    one, two = run(request(), top=2), run(request(), top=2, jobs=2)
    assert [p.to_json() for p in one.plans] == [p.to_json() for p in two.plans]


def test_certificate() -> None:
    for solver in ("auto", "highs"):
        planning = run(request(), solver=solver)
        certificate = certify(planning)
        best = planning.result.candidates[0].objective_s
        assert certificate["objective_s"] == pytest.approx(best, rel=1e-7)
        assert certificate["recomputed_objective_s"] == pytest.approx(best, rel=1e-9)
        assert certificate["recomputed_feasible"] is True
        assert certificate["bound_s"] <= best * (1 + 1e-9)


def test_no_time_at_all() -> None:
    """Either a plan with an honest gap, or nothing; never a false proof."""
    best = run(request()).result.candidates[0].objective_s
    try:
        found = run(request(), deadline=Deadline(at=0.0))
    except StoppedError:
        return
    assert found.plan.bound_s <= best * (1 + 1e-9)
    assert found.plan.objective_s >= best * (1 - 1e-9)
    if found.result.status is Status.OPTIMAL:
        assert found.result.candidates[0].objective_s == pytest.approx(best, rel=1e-9)


def test_sequences_longer_than_learned_positions_are_refused() -> None:
    learned = replace(tiny_model(4), position=Position.LEARNED, max_positions=512, position_rows=512)
    with pytest.raises(InputError, match="512 learned positions"):
        validate(request(model=learned, target=Target.ANY))
    validate(request(model=learned, target=Target.ANY, job=Job(global_batch=16, seq_length=512)))


def test_arithmetic_the_device_lacks_is_refused() -> None:
    old = read_cluster("1x4:v100-32gb")
    with pytest.raises(InputError, match="bf16"):
        validate(request(cluster=old))
    validate(request(cluster=old, job=replace(JOB, precision=Precision(compute=DType.FP16))))


def test_what_a_target_cannot_train_is_refused_by_name() -> None:
    capped = replace(tiny_model(4), logit_softcap=30.0)
    with pytest.raises(UnsupportedError, match="megatron") as caught:
        validate(request(model=capped))
    assert "soft-capping of logits" in caught.value.why
    validate(request(model=capped, target=Target.DEEPSPEED))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InputError, match="--global-batch 16 cannot be divided over 37 devices"):
        validate(request(cluster=read_cluster("1x37:h100")))


def test_knobs_that_leave_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="no strategy is left with --fix tp=3") as caught:
        validate(request(knobs=Knobs(fix={"tp": "3", "zero": "1"})))
    assert caught.value.why.startswith("tp(3) does not divide the 4 devices; tp 3 does not divide the 4 attention")


def test_what_does_not_fit_says_so() -> None:
    large = request(model=read_model("llama-2-13b"), cluster=read_cluster("1x1:l4"))
    with pytest.raises(InfeasibleError) as caught:
        run(large)
    assert "llama-2-13b does not fit on 1x1:l4" in caught.value.what
    assert "GiB are usable" in caught.value.why


def notes(**changes: object) -> set[str]:
    """What an answer supposes."""
    asked = request(**changes)
    found = assumptions(asked, build(asked)[1].costs)
    assert len(set(found)) == len(found)
    return set(found)


def test_assumptions_grow_with_what_is_asked() -> None:
    plain = notes()
    assert len(plain) >= 3
    assert plain < notes(target=Target.ANY)
    experts = replace(tiny_model(4), moe=Moe(num_experts=4, top_k=2, expert_ffn_size=512))
    assert len(notes(model=experts) - plain) == 2  # experts are balanced, and have a band of their own


def test_an_answer_says_how_far_measured_runs_were_from_their_predictions() -> None:
    asked = request(cluster=read_cluster("1x4:a100-80gb"))
    band = build(asked)[1].costs.time_band()
    assert any(f"4 of 5 took within {band:.0%} of" in note for note in notes(cluster=asked.cluster))
    under_deepspeed = replace(asked, target=Target.DEEPSPEED)
    assert build(under_deepspeed)[1].costs.time_band() > band  # few of whose runs are published
