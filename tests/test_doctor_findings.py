"""Every finding: a configuration that has it, one that has not, and what its remedy brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.doctors import advice, case, deepspeed, megatron
from uniap_tune.doctor.finding import FINDINGS, Finding, is_legal
from uniap_tune.doctor.findings import examine, microbatches_for
from uniap_tune.doctor.setup import Setup
from uniap_tune.predict import predict
from uniap_tune.spec import DType, Precision

GOOD = {"tp": "2", "pp": "2", "dp": "2", "zero": "1"}
NARROW = Precision(gradient_bytes=2)
FSDP = {"use-megatron-fsdp": True, "data-parallel-sharding-strategy": "optim_grads", "ckpt-format": "fsdp_dtensor"}
UNFUSED = {"attention-backend": "unfused"}


def unfused() -> Setup:
    setup = megatron(**GOOD, arguments=UNFUSED)
    recipe = replace(setup.recipe, job=replace(setup.job, flash_attention=False))
    return replace(setup, recipe=recipe)


def nearly_full(bands: float) -> Setup:
    """With a limit so many half-widths of the error above what is predicted."""
    setup = megatron(**GOOD)
    found = case(setup)
    needed = max(found.prediction.memory_bytes_per_stage) * (1 + bands * found.limit.band)
    share = (needed + found.prediction.overhead_bytes) / setup.cluster.device.memory_bytes
    return replace(setup, cluster=replace(setup.cluster, memory_fraction=share))


def deterministic() -> Setup:
    setup = megatron(**GOOD)
    return replace(setup, recipe=replace(setup.recipe, runtime=replace(setup.recipe.runtime, deterministic=True)))


def ds(**sections: object) -> Setup:
    setup = deepspeed(zero="2")
    return replace(setup, values={**setup.values, **sections})


ZERO2 = {"stage": 2, "overlap_comm": True}
OFFLOAD = {**ZERO2, "offload_optimizer": {"device": "cpu"}}

# For each finding a configuration that has it and the nearest one that has not.
CASES: dict[str, tuple[Callable[[], Setup], Callable[[], Setup]]] = {
    "large_bubble": (
        lambda: megatron(batch=16, pp="4", dp="2", zero="1"),
        lambda: megatron(batch=128, pp="4", dp="2", zero="1"),
    ),
    "uneven_stages": (
        lambda: megatron(pp="4", zero="1", layers="12,7,7,6"),
        lambda: megatron(pp="4", zero="1", layers="8,8,8,8"),
    ),
    "tensor_parallel_across_nodes": (
        lambda: megatron("llama-3-70b", "4x8:h100", tp="16", pp="2", zero="1"),
        lambda: megatron("llama-3-70b", "4x8:h100", tp="8", pp="4", zero="1"),
    ),
    "needless_recompute": (
        lambda: megatron(**GOOD, recompute="full"),
        lambda: megatron(**GOOD),
    ),
    "replicated_optimizer": (
        lambda: megatron(tp="2", pp="2", zero="0"),
        lambda: megatron(tp="2", pp="2", zero="1"),
    ),
    "needless_sharding": (
        lambda: megatron(tp="2", zero="3"),
        lambda: megatron(tp="2", zero="1"),
    ),
    "little_room": (lambda: nearly_full(0.5), lambda: nearly_full(1.5)),
    "missing_arithmetic": (
        lambda: megatron(**GOOD, precision=Precision(compute=DType.FP8)),
        lambda: megatron(on="1x8:h100", **GOOD, precision=Precision(compute=DType.FP8)),
    ),
    "sequence_parallel_off": (lambda: megatron(**GOOD, sp="off"), lambda: megatron(**GOOD, sp="on")),
    "gradients_not_overlapped": (lambda: megatron(**GOOD, overlap="off"), lambda: megatron(**GOOD)),
    "parameters_not_overlapped": (
        lambda: megatron(**GOOD, arguments={"overlap-param-gather": None}),
        lambda: megatron(**GOOD),
    ),
    "overlap_needs_sharded_optimizer": (
        lambda: megatron(tp="2", arguments={"overlap-param-gather": True}),
        lambda: megatron(tp="2", zero="1"),
    ),
    "tensor_communication_exposed": (
        lambda: megatron(tp="8"),
        lambda: megatron(tp="8", arguments={"tp-comm-overlap": True}),
    ),
    "sends_not_overlapped": (
        lambda: megatron(pp="4", vpp="2", zero="1", arguments={"no-overlap-p2p-communication": True}),
        lambda: megatron(pp="4", vpp="2", zero="1"),
    ),
    "selective_recompute_with_fused_attention": (
        lambda: megatron(**GOOD, recompute="selective"),
        unfused,
    ),
    "attention_not_fused": (unfused, lambda: megatron(**GOOD)),
    "gradients_in_bf16": (lambda: megatron(**GOOD, precision=NARROW), lambda: megatron(**GOOD)),
    "sharding_in_pipeline": (
        lambda: megatron(**GOOD, arguments=FSDP),
        lambda: megatron(tp="2", zero="1", arguments=FSDP),
    ),
    "virtual_stages_of_unequal_size": (
        lambda: megatron(pp="2", zero="1", arguments={"pipeline-model-parallel-layout": "Et*8|t*4|t*10|t*10L"}),
        lambda: megatron(pp="2", vpp="2", zero="1"),
    ),
    "deterministic_kernels": (deterministic, lambda: megatron(**GOOD)),
    "reduction_not_overlapped": (lambda: deepspeed(zero="2", overlap="off"), lambda: deepspeed(zero="2")),
    "needless_offload": (lambda: ds(zero_optimization=OFFLOAD), lambda: ds(zero_optimization=ZERO2)),
    "ignored_pipeline_keys": (
        lambda: ds(pipeline={"stages": 2}),
        lambda: ds(pipeline={"activation_checkpoint_interval": 1}),
    ),
    "narrow_gradients": (
        lambda: deepspeed(zero="2"),
        lambda: deepspeed(zero="0"),
    ),
}


def test_every_finding_has_its_cases() -> None:
    assert {known.name for known in FINDINGS} == set(CASES)
    assert len(FINDINGS) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_is_found_where_it_is_and_nowhere_else(name: str) -> None:
    sick, healthy = CASES[name]
    found = advice(name, sick())
    assert found is not None
    assert found.sentence[-1] not in ".;"
    assert advice(name, healthy()) is None


# What a remedy must do: be faster, or free memory; the others have none that can be priced.
FASTER = {
    "large_bubble", "uneven_stages", "tensor_parallel_across_nodes", "needless_recompute", "needless_sharding",
    "sequence_parallel_off", "gradients_not_overlapped", "parameters_not_overlapped", "attention_not_fused",
    "selective_recompute_with_fused_attention", "reduction_not_overlapped",
}  # fmt: skip
LEANER = {"replicated_optimizer", "sequence_parallel_off", "attention_not_fused"}


@pytest.mark.parametrize("name", sorted(FASTER | LEANER))
def test_remedies_help(name: str) -> None:
    setup = CASES[name][0]()
    found = advice(name, setup)
    assert found is not None
    assert found.remedy is not None
    assert found.remedy.edits
    assert is_legal(setup, found.remedy)
    before, after = predict(setup.run()), predict(found.remedy.setup.run())
    if name in FASTER:
        assert after.step_time_s < before.step_time_s
    if name in LEANER:
        assert max(after.memory_bytes_per_stage) < max(before.memory_bytes_per_stage)
    assert advice(name, found.remedy.setup) is None or name == "large_bubble"


def by_name(setup: Setup) -> dict[str, Finding]:
    return {item.name: item for item in examine(case(setup))}


def test_the_loss_is_the_difference_of_two_predictions() -> None:
    setup = megatron(**GOOD, sp="off")
    found = by_name(setup)["sequence_parallel_off"]
    other = predict(megatron(**GOOD, sp="on").run())
    today = predict(setup.run())
    assert found.lost_s == pytest.approx(today.step_time_s - other.step_time_s, rel=1e-12)
    assert found.lost_bytes == pytest.approx(max(today.memory_bytes_per_stage) - max(other.memory_bytes_per_stage))
    assert found.edits == ("--sequence-parallel",)


def test_findings_come_dearest_first() -> None:
    losses = [item.lost_s or 0.0 for item in examine(case(megatron(tp="8", sp="off", recompute="full", overlap="off")))]
    assert len(losses) >= 2
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("batch", [16, 24, 32])
def test_the_number_of_microbatches_named_cuts_the_bubble(batch: int) -> None:
    """With exactly that many the bubble is at most a tenth, with one fewer it is more."""
    sick = case(megatron(batch=batch, pp="4", dp="2", zero="1"))
    needed = microbatches_for(sick, 0.10)
    enough, short = (case(megatron(batch=2 * count, pp="4", dp="2", zero="1")) for count in (needed, needed - 1))
    assert enough.breakdown.bubble <= 0.10 + 1e-3
    assert short.breakdown.bubble > 0.10 - 1e-3
    assert f"{needed} would cut it" in getattr(advice("large_bubble", sick.setup), "sentence", "")


def test_reducing_to_one_rank_sends_half_of_reducing_for_all() -> None:
    section = {"stage": 1, "overlap_comm": False}
    to_one = {"use_multi_rank_bucket_allreduce": False}
    usual, narrow, both = (
        predict(ds(zero_optimization=section | more).run()).step_time_s
        for more in ({}, to_one, to_one | {"reduce_scatter": False})
    )
    assert narrow < usual == both
