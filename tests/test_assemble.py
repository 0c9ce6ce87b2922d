"""Plans made of candidates: their parts add up, and everything in them is in the candidate."""

from __future__ import annotations

import pytest

from tests.tiny import Tiny, tiny
from uniap_tune.assemble import OPTIMIZER_STEP, RESERVED, RESHARD, assemble
from uniap_tune.plan import Plan
from uniap_tune.problem import evaluate
from uniap_tune.search import Candidate, search
from uniap_tune.simulate import StageTimes, simulate
from uniap_tune.strategy import Target

CASES = {
    "megatron": (Target.MEGATRON, {}),
    "pipeline": (Target.MEGATRON, {"fix": ("pp=2",), "cluster": "1x4:a100-80gb"}),
    "deepspeed": (Target.DEEPSPEED, {"fix": ("pp=2", "zero=0")}),
    "any": (Target.ANY, {"maximum": ("zero=1",), "cluster": "1x4:a100-80gb"}),
    "any pipeline": (Target.ANY, {"fix": ("pp=2",), "maximum": ("zero=2",), "cluster": "1x4:a100-80gb"}),
}


def plans(job: Tiny) -> list[tuple[Candidate, Plan]]:
    result = search(job.space, job.pricer)
    reserved = job.pricer.costs.reserved_bytes()
    return [
        (
            candidate,
            assemble(
                candidate,
                graph=job.pricer.graph,
                costs=job.pricer.costs,
                cluster=job.space.cluster,
                job=job.space.job,
                target=job.space.capabilities.target,
                memory_limit_bytes=job.pricer.limit_bytes + reserved,
                bound_s=result.bound_s,
                status="optimal",
                inputs={"hash": "0"},
                assumptions=("a",),
            ),
        )
        for candidate in result.candidates
    ]


@pytest.mark.parametrize("part", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_parts_add_up(case: str, part: float) -> None:
    target, options = CASES[case]
    job = tiny(target, num_layers=3, **options)  # type: ignore[arg-type]
    least, most = job.peaks()
    job = job.with_limit(least + part * (most - least))
    reserved = job.pricer.costs.reserved_bytes()
    for candidate, plan in plans(job):
        value = evaluate(candidate.formulation.problem, candidate.assignment)
        assert plan.objective_s == value.objective_s
        assert plan.bound_s <= plan.objective_s
        assert plan.pp == len(plan.stages) == candidate.pp
        assert [name for stage in plan.stages for name in stage.layers] == [x.name for x in job.pricer.graph.layers]
        for i, stage in enumerate(plan.stages):
            assert stage.peak_bytes == pytest.approx(value.stage_bytes[i] + reserved, rel=1e-12)
            assert stage.peak_bytes <= plan.memory_limit_bytes * (1 + 1e-12)
            assert stage.memory[RESERVED] == reserved
            assert sum(stage.time.values()) == pytest.approx(stage.time_s, rel=1e-12)
            assert sum(stage.step.values()) == pytest.approx(stage.step_s, rel=1e-12)
            assert 0 < stage.forward_s < stage.time_s
            assert stage.time_s == value.stage_time_s[i]
            assert stage.link_s == (value.link_time_s[i] if i < plan.pp - 1 else 0.0)
            assert all(size > 0 for size in stage.memory.values())
            for strategy in stage.strategies:
                assert strategy.num_devices * plan.pp == job.space.cluster.num_devices
        assert plan.micro_batch_size * plan.num_microbatches * plan.strategies[0].dp == 4
        run = simulate(
            [StageTimes(s.forward_s, s.time_s - s.forward_s, s.link_s / 2) for s in plan.stages], plan.num_microbatches
        )
        assert plan.step_time_s == pytest.approx(run.seconds + max(s.step_s for s in plan.stages))
        assert plan.tokens_per_s == pytest.approx(4 * 512 / plan.step_time_s)
        assert 0 < plan.mfu < 1


def test_without_a_pipeline_the_simulation_is_the_closed_form() -> None:
    for _, plan in plans(tiny(Target.MEGATRON, fix=("pp=1",))):
        assert plan.step_time_s == pytest.approx(plan.objective_s, rel=1e-12)
        assert RESHARD not in plan.stages[0].time


def test_the_update_is_the_peak_where_it_needs_more_than_micro_batches() -> None:
    """DeepSpeed's fp32 copies of 16-bit gradients outweigh the activations of very short sequences."""
    job = tiny(Target.DEEPSPEED, hidden_size=1024, seq_length=16, fix=("zero=0", "pp=1", "mbs=1"))
    found = [plan for candidate, plan in plans(job)]
    assert found
    for candidate, plan in plans(job):
        costs = [c[k] for c, k in zip(candidate.formulation.costs, candidate.assignment.strategy, strict=True)]
        update = sum(cost.step_bytes for cost in costs)
        running = sum(cost.microbatch for cost in costs) + max(cost.transient_bytes for cost in costs)
        assert (OPTIMIZER_STEP in plan.stages[0].memory) == (update > running)
