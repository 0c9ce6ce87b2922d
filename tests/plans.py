"""Plans built by hand, for tests of what becomes of a plan. Their times and bytes mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from uniap_tune.plan import Plan, Stage
from uniap_tune.spec import Job, Recompute
from uniap_tune.strategy import Strategy, Target


def make_plan(
    target: Target,
    blocks: Sequence[int],
    strategy: Strategy,
    job: Job,
    *,
    microbatches: int,
    full: Sequence[int] | None = None,
    schedule: str = "1f1b",
    virtual_stages: int = 1,
) -> Plan:
    """A plan with one grid.

    Args:
        blocks: transformer blocks of each stage, or virtual stage; the embedding goes to the first, the head to the
            last.
        strategy: of every layer; embedding and head do not recompute.
        full: for each of ``blocks``, how many of the leading ones are recomputed in full instead.
        virtual_stages: model chunks on a stage; virtual stage k is on stage k modulo pp.
    """
    parts = []
    start = 0
    for index, count in enumerate(blocks):
        names = [f"layers.{i}" for i in range(start, start + count)]
        start += count
        leading = full[index] if full else 0
        strategies = [replace(strategy, recompute=Recompute.FULL)] * leading + [strategy] * (count - leading)
        outer = replace(strategy, recompute=Recompute.NONE)
        if index == 0:
            names.insert(0, "embedding")
            strategies.insert(0, outer)
        if index == len(blocks) - 1:
            names.append("head")
            strategies.append(outer)
        parts.append((names, strategies))
    pp = len(blocks) // virtual_stages
    stages = [_stage(parts[i::pp]) for i in range(pp)]
    return Plan(
        status="optimal",
        target=target,
        objective_s=1.0,
        bound_s=1.0,
        gap=0.0,
        step_time_s=1.0,
        tokens_per_s=1.0,
        mfu=0.5,
        memory_limit_bytes=80e9,
        pp=pp,
        virtual_stages=virtual_stages,
        num_microbatches=microbatches,
        micro_batch_size=job.global_batch // (microbatches * strategy.dp),
        schedule=schedule,
        stages=tuple(stages),
        inputs={"hash": "0123456789abcdef"},
    )


def _stage(chunks: Sequence[tuple[list[str], list[Strategy]]]) -> Stage:
    names = [name for layers, _ in chunks for name in layers]
    stage = make_stage(names, [strategy for _, strategies in chunks for strategy in strategies])
    if len(chunks) == 1:
        return stage
    sizes = tuple(len(layers) for layers, _ in chunks)
    return replace(stage, chunks=sizes, chunk_shares=tuple(size / (len(names) or 1) for size in sizes))


def make_stage(names: Sequence[str], strategies: Sequence[Strategy]) -> Stage:
    """A stage of these layers."""
    return Stage(
        layers=tuple(names),
        strategies=tuple(strategies),
        time_s=1.0,
        forward_s=0.4,
        link_s=0.0,
        step_s=0.1,
        time={"compute": 1.0},
        step={"optimizer": 0.1},
        memory={"parameters": 1e9},
    )
