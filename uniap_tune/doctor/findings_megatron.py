"""Findings about Megatron's arguments: what blocks overlap, and what silently loses."""

from __future__ import annotations

from dataclasses import replace

from uniap_tune.cost.parts import ACTIVATIONS, DP_COMM, TP_COMM
from uniap_tune.doctor.finding import OVERLAP, RISK, WASTE, Advice, Case, megatron_finding
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.moves_megatron import sharded
from uniap_tune.hardware import has_fused_attention
from uniap_tune.spec import DType
from uniap_tune.units import format_bytes, format_percent

# Communication above this part of a step is worth hiding [Empirical].
_NOTABLE = 0.05


def _share(case: Case, part: str) -> float:
    return case.breakdown.time.get(part, 0.0) / case.prediction.step_time_s


@megatron_finding(WASTE)
def sequence_parallel_off(case: Case, setup: MegatronSetup) -> Advice | None:
    """Tensor parallelism without sequence parallelism keeps norms and residuals on every rank."""
    facts = setup.facts
    if facts.tp == 1 or facts.sequence_parallel:
        return None
    activations = max(memory.get(ACTIVATIONS, 0.0) for memory in case.breakdown.memory)
    return Advice(
        sentence=f"sequence parallelism is off: every one of {facts.tp} tensor-parallel ranks computes and keeps the "
        f"same norms and residuals ({format_bytes(activations)} of activations)",
        remedy=setup.changed("sequence parallel", {"sequence-parallel": True}),
    )


@megatron_finding(OVERLAP)
def gradients_not_overlapped(case: Case, setup: MegatronSetup) -> Advice | None:
    """The reduction of gradients waits for the end of the backward pass."""
    facts = setup.facts
    if facts.dp * facts.cp == 1 or facts.zero > 1 or setup.overlaps_itself or facts.on("overlap-grad-reduce"):
        return None
    return Advice(
        sentence=f"gradients of {facts.dp * facts.cp} ranks are reduced after the backward pass instead of behind it "
        f"(exposed: {format_percent(_share(case, DP_COMM))} of the step)",
        remedy=setup.changed("overlap", {"overlap-grad-reduce": True}),
    )


@megatron_finding(OVERLAP)
def parameters_not_overlapped(_case: Case, setup: MegatronSetup) -> Advice | None:
    """The distributed optimizer gathers parameters before the forward pass instead of during it."""
    facts = setup.facts
    if facts.dp * facts.cp == 1 or facts.zero != 1 or setup.overlaps_itself or facts.on("overlap-param-gather"):
        return None
    if not facts.on("overlap-grad-reduce"):
        return None  # Megatron wants that first (arg:1024), which is a finding of its own
    return Advice(
        sentence="the distributed optimizer gathers all parameters before the forward pass instead of during it",
        remedy=setup.changed("overlap", {"overlap-param-gather": True}),
    )


@megatron_finding(OVERLAP)
def overlap_needs_sharded_optimizer(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Parameters can only be gathered behind the forward pass with the distributed optimizer."""
    facts = setup.facts
    if facts.zero or not facts.on("overlap-param-gather"):
        return None
    values = dict(sharded(setup, 1)) | {"overlap-param-gather": True}
    return Advice(
        sentence="--overlap-param-gather has nothing to overlap without the distributed optimizer",
        remedy=setup.changed("zero", values),
    )


@megatron_finding(OVERLAP)
def tensor_communication_exposed(case: Case, setup: MegatronSetup) -> Advice | None:
    """Tensor-parallel communication takes a notable part of the step, and nothing asks for its overlap, which only
    TransformerEngine's layers have."""
    facts = setup.facts
    share = _share(case, TP_COMM)
    if facts.tp == 1 or facts.on("tp-comm-overlap") or not facts.sequence_parallel or share <= _NOTABLE:
        return None
    if not setup.recipe.runtime.transformer_engine or setup.recipe.runtime.deterministic:
        return None
    return Advice(
        sentence=f"tensor-parallel communication is {format_percent(share)} of the step and exposed; --tp-comm-overlap "
        "(TransformerEngine's user buffers) runs GEMMs meanwhile",
        remedy=setup.changed("overlap", {"tp-comm-overlap": True}),
    )


@megatron_finding(OVERLAP)
def sends_not_overlapped(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Interleaved stages wait for every transfer, because its overlap is switched off."""
    facts = setup.facts
    if facts.pp == 1 or facts.virtual == 1 or not facts.on("no-overlap-p2p-communication"):
        return None
    return Advice(
        sentence=f"--no-overlap-p2p-communication makes {facts.virtual} chunks a stage wait for every transfer; the "
        "predicted time supposes that transfers overlap",
        remedy=None,
    )


@megatron_finding(WASTE)
def selective_recompute_with_fused_attention(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Selective recomputation of a core that fused attention recomputes anyway (arXiv 2205.14135)."""
    facts = setup.facts
    modules = facts.text("recompute-modules")
    if facts.recompute != "selective" or not setup.job.flash_attention or modules not in ("", "core_attn"):
        return None
    names = ("recompute-granularity", "recompute-activations", "recompute-modules")
    return Advice(
        sentence="selective recomputation runs attention again, which fused attention does anyway: it saves next to "
        "no memory",
        remedy=setup.changed("recompute", dict.fromkeys(names)),
    )


@megatron_finding(WASTE)
def attention_not_fused(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Attention writes its scores to memory although the device has fused kernels."""
    job, facts = setup.job, setup.facts
    if job.flash_attention or not has_fused_attention(setup.cluster.device) or job.precision.compute is DType.FP32:
        return None
    if facts.text("transformer-impl") == "local":
        values: dict[str, str | bool | None] = {"use-flash-attn": True}
    else:
        values = {"attention-backend": "auto"}
    return Advice(
        sentence="attention writes its scores to memory; fused attention (FlashAttention, cuDNN) does not",
        remedy=setup.changed("attention", values, job=replace(job, flash_attention=True)),
    )


@megatron_finding(RISK)
def gradients_in_bf16(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Gradients are summed in 16 bits, which loses what is small beside the sum."""
    facts = setup.facts
    sums = facts.dp * facts.cp * facts.microbatches
    if setup.job.precision.gradient_bytes != 2 or sums == 1:
        return None
    wide = replace(setup.job, precision=replace(setup.job.precision, gradient_bytes=4))
    option = setup.changed("gradients", {"grad-reduce-in-bf16": None}, job=wide)
    return Advice(
        sentence=f"{sums} gradients are summed in bf16, which drops what is below 0.4% of the sum: it saves memory and "
        "time at the price of accuracy",
        remedy=option,
    )


@megatron_finding(RISK)
def sharding_in_pipeline(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Gradients or parameters are sharded in a pipeline, where every micro-batch would have to gather them."""
    facts = setup.facts
    if facts.zero < 2 or facts.pp == 1:
        return None
    return Advice(
        sentence=f"ZeRO stage {facts.zero} in a pipeline of {facts.pp} stages gathers for every one of "
        f"{facts.microbatches} micro-batches; the distributed optimizer (stage 1) is what goes with pipelines",
        remedy=setup.changed("zero", sharded(setup, 1)),
    )


@megatron_finding(RISK)
def virtual_stages_of_unequal_size(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Chunks of one stage differ in size, so that a warm-up pass waits for the largest."""
    facts = setup.facts
    if facts.virtual == 1 or len(set(facts.chunks[1:-1])) <= 1:
        return None
    return Advice(
        sentence=f"the {len(facts.chunks)} chunks of the stages have between {min(facts.chunks)} and "
        f"{max(facts.chunks)} layers: in an interleaved schedule every chunk waits for the largest",
    )


@megatron_finding(WASTE)
def deterministic_kernels(_case: Case, setup: MegatronSetup) -> Advice | None:
    """Deterministic kernels are slower than the usual ones."""
    if not setup.recipe.runtime.deterministic:
        return None
    return Advice(sentence="--deterministic-mode takes slower kernels, which is not predicted: leave it to debugging")
