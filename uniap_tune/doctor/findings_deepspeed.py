"""Findings about a DeepSpeed JSON (DeepSpeed 0.19.8)."""

from __future__ import annotations

from dataclasses import replace

from uniap_tune.accumulation import holds_gradients_twice
from uniap_tune.cost.parts import DP_COMM
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.finding import OVERLAP, RISK, WASTE, Advice, Case, deepspeed_finding
from uniap_tune.predict import predict
from uniap_tune.strategy import CAPABILITIES, Target
from uniap_tune.units import format_percent


@deepspeed_finding(OVERLAP)
def reduction_not_overlapped(case: Case, setup: DeepSpeedSetup) -> Advice | None:
    """ZeRO 1 and 2 reduce gradients behind the backward pass only if ``overlap_comm`` says so."""
    if setup.overlaps or setup.dp == 1:
        return None
    share = case.breakdown.time.get(DP_COMM, 0.0) / case.prediction.step_time_s
    return Advice(
        sentence="zero_optimization.overlap_comm is off, the default of stages 1 and 2: gradients are reduced after "
        f"the backward pass (exposed: {format_percent(share)} of the step)",
        remedy=setup.with_overlap(),
    )


@deepspeed_finding(WASTE)
def needless_offload(case: Case, setup: DeepSpeedSetup) -> Advice | None:
    """States are kept in host memory although the devices have room for them."""
    if not setup.offloads:
        return None
    option = setup.without_offload()
    if not case.limit.surely_fits(predict(option.setup.run())):
        return None
    return Advice(
        sentence=f"{' and '.join(setup.offloads)} moves states over PCIe in every step although the devices have room "
        "for them (what it costs is not predicted)",
    )


@deepspeed_finding(RISK)
def ignored_pipeline_keys(_case: Case, setup: DeepSpeedSetup) -> Advice | None:
    """``pipeline.stages`` and ``pipeline.partition`` are ignored by DeepSpeed."""
    section = setup.values.get("pipeline")
    ignored = [key for key in ("stages", "partition") if isinstance(section, dict) and section.get(key) is not None]
    if not ignored:
        return None
    names = " and ".join(f"pipeline.{key}" for key in ignored)
    return Advice(
        sentence=f"DeepSpeed ignores {names}: stages and split are those of PipelineModule(num_stages=…) in the script",
    )


@deepspeed_finding(RISK)
def narrow_gradients(_case: Case, setup: DeepSpeedSetup) -> Advice | None:
    """Gradients accumulate in 16 bits, which loses what is small beside the sum."""
    precision = setup.job.precision
    sums = setup.dp * setup.microbatches
    if precision.param_bytes != 2 or precision.gradient_bytes == 4 or setup.zero == 0 or setup.microbatches == 1:
        return None
    wide = replace(setup.job, precision=replace(precision, gradient_bytes=4))
    engine = CAPABILITIES[Target.DEEPSPEED]
    more = 4 if holds_gradients_twice(wide, engine, zero=setup.zero, pp=setup.pp) else 2
    return Advice(
        sentence=f"{sums} gradients are summed in {precision.compute}: data_types.grad_accum_dtype = fp32 keeps what "
        f"is small, for {more} more bytes a gradient",
    )
