"""Pipeline schedules in closed form: seconds of a step, and how many micro-batches each stage holds.

1F1B and its interleaved form are those of arXiv 2104.04473 section 2.2, GPipe that of arXiv 1811.06965.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Schedule(StrEnum):
    """The order in which a stage runs its forward and backward passes."""

    ONE_F_ONE_B = "1f1b"
    GPIPE = "gpipe"


def step_seconds(
    stages: Sequence[float], links: Sequence[float], num_microbatches: int, virtual_stages: int = 1
) -> float:
    """Seconds from the first forward to the last backward of a step.

    Without virtual stages: the first micro-batch passes every stage and link; the slowest stage, which in 1F1B waits
    for its own transfers, then repeats for the others. With v virtual stages the ramp is 1/v as long and transfers
    of the steady state are overlapped, but each micro-batch crosses v times as many borders during the ramp.

    Args:
        stages: seconds of one micro-batch on each stage, forward and backward, all its virtual stages together.
        links: seconds to cross each border between neighbouring stages, there and back.
        num_microbatches: micro-batches of a step.
        virtual_stages: model chunks on each stage.
    """
    if len(stages) == 1:
        return num_microbatches * stages[0]
    if virtual_stages > 1:
        ramp = (sum(stages) - max(stages)) / virtual_stages + sum(links)
        return num_microbatches * max(stages) + ramp
    waits = [stage + link for stage, link in zip(stages, [*links, links[-1]], strict=True)]
    return sum(stages) + sum(links) + (num_microbatches - 1) * max(waits)


def chunks_in_flight(
    stage: int,
    num_stages: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    schedule: Schedule = Schedule.ONE_F_ONE_B,
    group: int | None = None,
    ahead: int = 0,
) -> list[int]:
    """Micro-batches whose activations a stage holds at its fullest, for each of its model chunks.

    1F1B: min(m, p - i) (arXiv 2104.04473). Interleaved: 2 (p - i - 1) + (v - 1) p warm-up passes and the one being
    run (Megatron-LM, schedules.py), taken by the chunks in groups of p, or of ``group``; ``ahead``: further passes
    before the first backward one (one where experts' exchanges hide behind another micro-batch). GPipe: all of them.
    """
    if schedule is Schedule.GPIPE:
        return [num_microbatches] * virtual_stages
    if virtual_stages == 1:
        return [min(num_microbatches, num_stages - stage)]
    group = group or num_stages
    passes = 2 * (num_stages - stage - 1) + (virtual_stages - 1) * group + 1 + ahead
    passes = min(passes, num_microbatches * virtual_stages)
    held = [0] * virtual_stages
    chunk = 0
    while passes > 0:
        taken = min(passes, group)
        held[chunk % virtual_stages] += taken
        passes -= taken
        chunk += 1
    return held
