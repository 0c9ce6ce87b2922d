"""What can be read off plans: the grid, where the time goes, how two differ; and what binds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType

from uniap_tune.assemble import RESHARD, simulated_seconds
from uniap_tune.breakdown import BUBBLE, SEND
from uniap_tune.cost.parts import (
    COMPUTE,
    CP_COMM,
    DP_COMM,
    EP_COMM,
    OPTIMIZER,
    RECOMPUTE,
    TP_COMM,
    ZERO_COMM,
)
from uniap_tune.formulate import Pricer
from uniap_tune.plan import Plan, Stage
from uniap_tune.search import SearchOptions, search
from uniap_tune.space import Space
from uniap_tune.strategy import Strategy
from uniap_tune.units import format_bytes, format_percent

# A change smaller than this is not worth a word.
NOTABLE = 1e-3

# A limit that no plan exceeds, as a multiple of the memory there is.
UNLIMITED = 1e6

# What people call the parts of a step.
PART_NAMES: Mapping[str, str] = MappingProxyType(
    {
        COMPUTE: "compute",
        RECOMPUTE: "recompute",
        TP_COMM: "TP communication",
        CP_COMM: "CP communication",
        EP_COMM: "EP communication",
        ZERO_COMM: "ZeRO communication",
        DP_COMM: "DP communication",
        RESHARD: "re-sharding",
        SEND: "PP sends",
        BUBBLE: "bubble",
        OPTIMIZER: "optimizer",
    }
)


@dataclass(frozen=True, slots=True)
class Binding:
    """What limits a plan. ``faster_without_limit``: relative gain if memory were unlimited."""

    sentence: str
    faster_without_limit: float


def binding(plan: Plan, space: Space, pricer: Pricer, options: SearchOptions | None = None) -> Binding:
    """The binding constraint, found by solving again without the memory limit."""
    best = search(space, pricer.with_limit(UNLIMITED * plan.memory_limit_bytes), options or SearchOptions()).candidates
    gain = 1 - best[0].objective_s / plan.objective_s if best else 0.0
    fullest = max(range(plan.pp), key=lambda i: plan.stages[i].peak_bytes)
    slowest = max(range(plan.pp), key=lambda i: plan.stages[i].time_s)
    if gain > NOTABLE:
        used = format_bytes(plan.stages[fullest].peak_bytes)
        return Binding(
            f"memory on stage {fullest} ({used} of {format_bytes(plan.memory_limit_bytes)}): "
            f"without the limit a step would be {format_percent(gain)} faster",
            gain,
        )
    if plan.pp > 1:
        share = bubble_fraction(plan)
        return Binding(f"compute on stage {slowest}; memory does not bind, the bubble is {format_percent(share)}", 0.0)
    return Binding("compute; memory does not bind", 0.0)


def bubble_fraction(plan: Plan) -> float:
    """Part of the pipeline's time its average stage idles."""
    useful = plan.num_microbatches * sum(stage.time_s for stage in plan.stages) / plan.pp
    step = max(stage.step_s for stage in plan.stages)
    return 1 - useful / (plan.step_time_s - step) if plan.step_time_s > step else 0.0


def time_shares(plan: Plan) -> dict[str, float]:
    """Seconds of a step by part; they sum to ``plan.step_time_s``.

    Of micro-batches those of the slowest stage, of what is done once a step those of the stage that takes longest for
    it. What the slowest stage waits is ``bubble`` as far as it would wait with links that take no time, else ``send``.
    """
    slowest = max(plan.stages, key=lambda s: s.time_s)
    shares = {name: plan.num_microbatches * value for name, value in slowest.time.items()}
    for name, value in max(plan.stages, key=lambda s: s.step_s).step.items():
        shares[name] = shares.get(name, 0.0) + value
    waits = max(0.0, plan.step_time_s - sum(shares.values()))
    linked = simulated_seconds(plan.stages, plan.num_microbatches, plan.virtual_stages)
    free = tuple(replace(s, link_s=0.0) for s in plan.stages)
    alone = simulated_seconds(free, plan.num_microbatches, plan.virtual_stages)
    shares[SEND] = min(waits, linked - alone)
    shares[BUBBLE] = waits - shares[SEND]
    return {name: value for name, value in shares.items() if value > 0}


def summarize_strategies(stage: Stage) -> list[tuple[int, str]]:
    """(count, strategy) runs of a stage's layers, in order, layers of one strategy together."""
    return [(len(list(run)), text) for text, run in groupby(s.describe() for s in stage.strategies)]


def grid(plan: Plan) -> str:
    """The plan in one line: ``"pp 2, tp 8, dp 4, zero 1, micro-batch 1 x 32, recompute none"``."""
    uniform = plan.uniform()
    parts = [f"pp {plan.pp}"]
    if plan.virtual_stages > 1:
        parts.append(f"vpp {plan.virtual_stages}")
    if uniform is not None:
        parts += [f"tp {uniform.tp}", f"dp {uniform.dp}"]
        parts += [f"{name} {size}" for name, size in _small_axes(uniform) if size > 1]
        parts.append(f"zero {uniform.zero}")
    else:
        parts.append("strategies differ by layer")
    parts.append(f"micro-batch {plan.micro_batch_size} x {plan.num_microbatches}")
    parts.append(f"recompute {recompute_text(plan)}")
    return ", ".join(parts)


def _small_axes(strategy: Strategy) -> list[tuple[str, int]]:
    return [("cp", strategy.cp), ("ep", strategy.ep), ("etp", strategy.etp)]


def recompute_text(plan: Plan) -> str:
    """``"none"``, ``"full"`` or how many blocks of how many are recomputed, by mode."""
    blocks = [s for stage in plan.stages for s in stage.block_strategies()]
    counts = {mode: sum(s.recompute is mode for s in blocks) for mode in dict.fromkeys(s.recompute for s in blocks)}
    if len(counts) == 1:
        return str(next(iter(counts)))
    return " + ".join(f"{mode} {count}/{len(blocks)}" for mode, count in counts.items())


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan beside the one it is compared with.

    Attributes:
        plan: the other plan.
        slower: relative difference of the step times, which are simulated.
        slower_proven: relative difference of the objectives; not negative where the plan compared with is the optimum.
        parts: seconds of a step by part, the other's less the plan's; they sum to the difference of the step times.
    """

    plan: Plan
    slower: float
    slower_proven: float
    parts: Mapping[str, float]


def compare(other: Plan, plan: Plan) -> Alternative:
    """Another plan of the same job beside ``plan``."""
    theirs, ours = time_shares(other), time_shares(plan)
    return Alternative(
        plan=other,
        slower=other.step_time_s / plan.step_time_s - 1,
        slower_proven=other.objective_s / plan.objective_s - 1,
        parts={name: theirs.get(name, 0.0) - ours.get(name, 0.0) for name in {**ours, **theirs}},
    )
