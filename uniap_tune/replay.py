"""How long a candidate's step takes when its schedule is played event by event, and by what it is judged.

Plain pipelines are judged by TPI, the paper's closed form. That of interleaved ones is the form of even chunks, and up
to a tenth too low where layers do not divide evenly: a family with virtual stages stands for its cut of the least
closed form, and that is judged by the larger of its closed form and its simulated step.
"""

from __future__ import annotations

from uniap_tune.formulate import Formulation
from uniap_tune.problem import Assignment, Evaluation, evaluate
from uniap_tune.simulate import StageTimes, simulate

# From a few rounds of micro-batches on, a round takes as long as the one before: the schedule has become periodic.
_ROUNDS = 5


def judged_seconds(formulation: Formulation, assignment: Assignment) -> float:
    """Seconds by which a candidate is compared with others."""
    value = evaluate(formulation.problem, assignment)
    if formulation.problem.virtual_stages == 1:
        return value.objective_s
    return max(value.objective_s, played_seconds(formulation, assignment, value))


def played_seconds(formulation: Formulation, assignment: Assignment, value: Evaluation) -> float:
    """Seconds of a step: the interleaved schedule, then the slowest stage's once-a-step work."""
    problem = formulation.problem
    times = [_stage_times(formulation, assignment, value, i) for i in range(problem.num_stages)]
    seconds = periodic_seconds(times, problem.num_microbatches, problem.virtual_stages)
    return seconds + max(value.stage_step_s)


def periodic_seconds(stages: list[StageTimes], num_microbatches: int, virtual_stages: int) -> float:
    """As :func:`~uniap_tune.simulate.simulate`, with all rounds of micro-batches but the first few by their period."""
    size = len(stages)
    rounds, rest = divmod(num_microbatches, size)
    if rest or rounds <= _ROUNDS:
        return simulate(stages, num_microbatches, virtual_stages=virtual_stages).seconds
    before, first = (
        simulate(stages, size * count, virtual_stages=virtual_stages).seconds for count in (_ROUNDS - 1, _ROUNDS)
    )
    return first + (rounds - _ROUNDS) * (first - before)


def chunk_shares(formulation: Formulation, assignment: Assignment, stage: int) -> tuple[float, ...]:
    """The part of a stage's seconds in each of its model chunks."""
    problem = formulation.problem
    chunks = [0.0] * problem.virtual_stages
    for u, interval in enumerate(assignment.stage):
        if interval % problem.num_stages == stage:
            chunks[interval // problem.num_stages] += formulation.costs[u][assignment.strategy[u]].time
    whole = sum(chunks) or 1.0
    return tuple(seconds / whole for seconds in chunks)


def _stage_times(formulation: Formulation, assignment: Assignment, value: Evaluation, i: int) -> StageTimes:
    size = formulation.problem.num_stages
    layers = [u for u, interval in enumerate(assignment.stage) if interval % size == i]
    forward = sum(formulation.costs[u][assignment.strategy[u]].forward for u in layers)
    shares = chunk_shares(formulation, assignment, i)
    link = value.link_time_s[i] / 2 if i < len(value.link_time_s) else 0.0
    return StageTimes(forward, value.stage_time_s[i] - forward, link, shares)
