"""Findings for every engine: mistakes that lose time or memory without a word from the engine."""

from __future__ import annotations

import uniap_tune.doctor.findings_deepspeed
import uniap_tune.doctor.findings_megatron  # noqa: F401 - both register their checks
from uniap_tune.breakdown import BUBBLE, SEND
from uniap_tune.cost.parts import OPTIMIZER_STATES, TP_COMM
from uniap_tune.doctor.finding import FINDINGS, RISK, WASTE, Advice, Case, examine, finding, is_legal
from uniap_tune.doctor.options import options_of
from uniap_tune.predict import predict
from uniap_tune.spec import Recompute
from uniap_tune.units import format_bytes, format_percent

__all__ = ["FINDINGS", "examine"]

# A bubble above this part of a step is worth a word [Empirical].
LARGE_BUBBLE = 0.10
# The slowest stage may take this much longer than the average before the split is called uneven [Empirical].
LARGE_IMBALANCE = 0.08


@finding(WASTE)
def large_bubble(case: Case) -> Advice | None:
    """The pipeline fills and drains for more than 10% of the step."""
    run, breakdown = case.run, case.breakdown
    if run.pp == 1 or breakdown.bubble <= LARGE_BUBBLE:
        return None
    needed = microbatches_for(case, LARGE_BUBBLE)
    chunks = f" of {run.virtual_stages} chunks" if run.virtual_stages > 1 else ""
    return Advice(
        sentence=f"the pipeline bubble is {format_percent(breakdown.bubble)} of the step: {run.pp} stages{chunks} "
        f"share {run.num_microbatches} micro-batches; {needed} would cut it to {format_percent(LARGE_BUBBLE)}",
        remedy=case.best(options_of(case.setup, "micro-batch", "vpp")),
    )


def microbatches_for(case: Case, share: float) -> int:
    """The least number of micro-batches like those of today with which the bubble is at most ``share`` of a step."""
    time, step = case.breakdown.time, case.prediction.step_time_s
    bubble, sends = time[BUBBLE], time.get(SEND, 0.0)
    work = step - bubble - sends
    each = work / case.run.num_microbatches
    needed = case.run.num_microbatches
    missing = bubble / share - step
    return needed + max(0, -int(-missing // each))


@finding(WASTE)
def uneven_stages(case: Case) -> Advice | None:
    """One pipeline stage takes clearly longer than the average, and the others wait for it."""
    seconds = case.breakdown.stage_s
    average = sum(seconds) / len(seconds)
    over = max(seconds) / average - 1
    if case.run.pp == 1 or over <= LARGE_IMBALANCE:
        return None
    slowest = seconds.index(max(seconds))
    blocks = case.breakdown.blocks[slowest]
    return Advice(
        sentence=f"stage {slowest} ({blocks:g} layers) takes {format_percent(over)} longer than the average stage, "
        "and every other stage waits for it",
        remedy=case.best(options_of(case.setup, "layers")),
    )


@finding(WASTE)
def tensor_parallel_across_nodes(case: Case) -> Advice | None:
    """Tensor parallelism, which communicates in every layer, crosses the slow network."""
    tp, *_ = case.grid
    domain = case.run.cluster.fast_domain
    if tp <= domain:
        return None
    share = case.breakdown.time.get(TP_COMM, 0.0) / case.prediction.step_time_s
    inside = [
        o for o in options_of(case.setup, "tp/pp", "tp/dp", "tp/cp") if o.setup.run().chunks[0][0].strategy.tp <= domain
    ]
    legal = [option for option in inside if is_legal(case.setup, option)]
    fitting = [option for option in legal if case.limit.surely_fits(predict(option.setup.run()))]
    return Advice(
        sentence=f"tensor parallelism over {tp} devices leaves the {domain} that fast links join: its communication is "
        f"{format_percent(share)} of the step",
        remedy=min(fitting or legal, key=lambda o: predict(o.setup.run()).step_time_s, default=None),
    )


@finding(WASTE)
def needless_recompute(case: Case) -> Advice | None:
    """Layers are recomputed although the memory that this saves is free."""
    modes = {layers.strategy.recompute for chunk in case.run.chunks for layers in chunk}
    if Recompute.FULL not in modes:
        return None
    remedy = case.best(options_of(case.setup, "recompute"))
    if remedy is None:
        return None
    free = min(case.limit.room(case.prediction))
    return Advice(
        sentence=f"layers are recomputed in full although {format_bytes(free)} of every device stay free",
        remedy=remedy,
    )


@finding(WASTE)
def replicated_optimizer(case: Case) -> Advice | None:
    """Every data-parallel rank keeps all optimizer states."""
    _, dp, cp, zero = case.grid
    if zero or dp * cp == 1:
        return None
    states = max(memory.get(OPTIMIZER_STATES, 0.0) for memory in case.breakdown.memory)
    remedy = next((o for o in options_of(case.setup, "zero") if o.setup.settings.get("zero") == "1"), None)
    if remedy is not None and not is_legal(case.setup, remedy):
        remedy = None
    return Advice(
        sentence=f"optimizer states of {format_bytes(states)} are the same on {dp * cp} ranks; sharded they take "
        f"{format_bytes(states / (dp * cp))}",
        remedy=remedy,
    )


@finding(WASTE)
def needless_sharding(case: Case) -> Advice | None:
    """Gradients or parameters are sharded although optimizer states alone would be enough."""
    _, dp, cp, zero = case.grid
    if zero < 2 or dp * cp == 1:
        return None
    lower = [o for o in options_of(case.setup, "zero") if 1 <= int(o.setup.settings["zero"]) < zero]
    remedy = case.best(lower)
    if remedy is None:
        return None
    return Advice(
        sentence=f"ZeRO stage {zero} gathers or scatters in every micro-batch, although stage "
        f"{remedy.setup.settings['zero']} fits",
        remedy=remedy,
    )


@finding(RISK)
def little_room(case: Case) -> Advice | None:
    """It fits, but the limit lies within the error of the prediction."""
    if not case.limit.fits(case.prediction) or case.limit.surely_fits(case.prediction):
        return None
    room = min(case.limit.room(case.prediction))
    return Advice(
        sentence=f"only {format_bytes(room)} stay free on the fullest stage, less than the error of the prediction "
        f"({format_percent(case.limit.band)}): it may run out of memory",
    )


@finding(RISK)
def missing_arithmetic(case: Case) -> Advice | None:
    """The device cannot compute in the number format that is asked for."""
    device, wanted = case.run.cluster.device, case.run.job.precision.compute
    if wanted in device.peak_flops:
        return None
    known = ", ".join(device.peak_flops)
    return Advice(sentence=f"{device.name} has no {wanted} arithmetic; it has {known}")
