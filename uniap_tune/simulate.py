"""An independent re-evaluation of a plan: the schedule, event by event, and the objective and memory from scratch.

Shares no code with the solvers, so that a certificate can be checked by something else than what produced it.

The closed form of the formulation treats a link as one more pipeline stage, which hides communication that strict
1F1B cannot hide: a stage that has sent its activations waits a whole round trip for their gradient. Here every
forward and backward pass starts when its stage is free and its input has arrived, and nothing else is assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uniap_tune.problem import Assignment, Problem
from uniap_tune.schedule import Schedule


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one micro-batch on one stage (all its model chunks), and of the link to the next one, one way.

    ``shares``: the part of the stage's work in each of its chunks; equal parts if it is empty.
    """

    forward: float
    backward: float
    link: float
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward or backward pass of one micro-batch through one chunk of a stage."""

    stage: int
    chunk: int
    microbatch: int
    is_forward: bool


@dataclass(frozen=True, slots=True)
class Run:
    """What a simulated step did: its seconds, and for each stage the seconds it worked and the most micro-batch
    chunks it held at once."""

    seconds: float
    busy: tuple[float, ...]
    most_held: tuple[int, ...]


def simulate(
    stages: Sequence[StageTimes],
    num_microbatches: int,
    schedule: Schedule = Schedule.ONE_F_ONE_B,
    virtual_stages: int = 1,
) -> Run:
    """Run one step. With ``virtual_stages`` v each stage has v chunks (interleaved 1F1B).

    Raises:
        ValueError: a schedule that deadlocks (interleaving needs micro-batches in multiples of the stages).
    """
    size, v = len(stages), virtual_stages
    orders = [list(_order(i, size, num_microbatches, schedule, v)) for i in range(size)]
    done: dict[Pass, float] = {}
    free = [0.0] * size
    place = [0] * size
    held = [0] * size
    most = [0] * size
    remaining = sum(len(order) for order in orders)
    while remaining:
        progress = remaining
        for i, order in enumerate(orders):
            while place[i] < len(order):
                item = order[place[i]]
                ready = _ready(item, stages, done, v)
                if ready is None:
                    break
                work = stages[i].forward if item.is_forward else stages[i].backward
                share = stages[i].shares[item.chunk] if stages[i].shares else 1 / v
                free[i] = done[item] = max(free[i], ready) + work * share
                held[i] += 1 if item.is_forward else -1
                most[i] = max(most[i], held[i])
                place[i] += 1
                remaining -= 1
        if remaining == progress:
            raise ValueError(f"the schedule of {size} stages, {num_microbatches} micro-batches, {v} chunks deadlocks")
    busy = tuple(num_microbatches * (s.forward + s.backward) for s in stages)
    return Run(max(free), busy, tuple(most))


def _ready(item: Pass, stages: Sequence[StageTimes], done: dict[Pass, float], v: int) -> float | None:
    """When the input of a pass arrives; ``None`` while it is not known."""
    size, i, m = len(stages), item.stage, item.microbatch
    if item.is_forward:
        if i > 0:
            before, link = Pass(i - 1, item.chunk, m, True), stages[i - 1].link
        elif item.chunk > 0:
            before, link = Pass(size - 1, item.chunk - 1, m, True), stages[-1].link
        else:
            return 0.0
    elif i < size - 1:
        before, link = Pass(i + 1, item.chunk, m, False), stages[i].link
    elif item.chunk < v - 1:
        before, link = Pass(0, item.chunk + 1, m, False), stages[-1].link
    else:
        before, link = Pass(i, item.chunk, m, True), 0.0
    finished = done.get(before)
    return None if finished is None else finished + link


def _order(i: int, size: int, c: int, schedule: Schedule, v: int) -> Iterator[Pass]:
    """The passes of stage i in the order it runs them (Megatron-LM schedules.py; GPipe: arXiv 1811.06965)."""
    if schedule is Schedule.GPIPE:
        yield from (Pass(i, 0, m, True) for m in range(c))
        yield from (Pass(i, 0, m, False) for m in range(c))
        return
    forwards = [_place(n, size, v, True) for n in range(c * v)]
    backwards = [_place(n, size, v, False) for n in range(c * v)]
    warmup = min(size - i - 1 if v == 1 else 2 * (size - i - 1) + (v - 1) * size, c * v)
    for chunk, m in forwards[:warmup]:
        yield Pass(i, chunk, m, True)
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield Pass(i, forward[0], forward[1], True)
        yield Pass(i, backward[0], backward[1], False)
    for chunk, m in backwards[c * v - warmup :]:
        yield Pass(i, chunk, m, False)


def _place(n: int, size: int, v: int, is_forward: bool) -> tuple[int, int]:
    """Chunk and micro-batch of the n-th forward or backward pass of a stage, in groups of ``size`` micro-batches."""
    if v == 1:
        return 0, n
    group, within = divmod(n, size * v)
    chunk, m = divmod(within, size)
    return (chunk if is_forward else v - 1 - chunk), group * size + m


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Objective and bytes of an assignment, from the problem's tables alone."""

    objective_s: float
    stage_bytes: tuple[float, ...]
    feasible: bool


def recompute(problem: Problem, assignment: Assignment) -> Recomputed:
    """Re-evaluate an assignment by the definition in docs/explanation/solver.md, stage by stage."""
    count, c, v = problem.num_stages, problem.num_microbatches, problem.virtual_stages
    works, updates, sizes = [], [], []
    for i in range(count):
        layers = [u for u, s in enumerate(assignment.stage) if s % count == i]
        chosen = [(problem.layers[u], assignment.strategy[u]) for u in layers]
        works.append(sum(float(t.time_s[k]) for t, k in chosen) + _inside(problem, assignment, i))
        updates.append(sum(float(t.step_time_s[k]) for t, k in chosen))
        static = sum(float(t.static_bytes[k]) for t, k in chosen)
        held = [_held(problem, assignment.stage[u]) * float(t.microbatch_bytes[k])
                for u, (t, k) in zip(layers, chosen, strict=True)]  # fmt: skip
        running = static + sum(held) + max((float(t.transient_bytes[k]) for t, k in chosen), default=0.0)
        sizes.append(max(running, static + sum(float(t.step_bytes[k]) for t, k in chosen)))
    links = [_across(problem, assignment, j) for j in range(count - 1)]
    if v > 1:  # (c - 1) micro-batches pass the slowest stage whole, one more through all stages at 1/v of their work
        objective = (c - 1) * max(works) + max(works) * (1 - 1 / v) + sum(works) / v + sum(links) + max(updates)
    else:
        objective = sum(works) + sum(links) + (c - 1) * max(works + links) + max(updates)
    limit = problem.memory_limit_bytes * (1 + 1e-12)
    # sums are taken in another order here than in the solvers: allow their rounding, a few ulps
    feasible = all(size <= limit * (1 + 1e-14) for size in sizes) and _in_order(assignment, v * count)
    return Recomputed(objective, tuple(sizes), feasible)


def _held(problem: Problem, interval: int) -> int:
    """Micro-batches whose activations an interval of layers holds when its stage holds most."""
    count, c, v = problem.num_stages, problem.num_microbatches, problem.virtual_stages
    if problem.schedule is Schedule.GPIPE:
        return c
    if v == 1:
        return min(c, count - interval)
    stage, chunk = interval % count, interval // count
    passes = min(2 * (count - stage - 1) + (v - 1) * count + 1, c * v)  # forward passes before the first backward
    return sum(n // count % v == chunk for n in range(passes))


def _layouts(problem: Problem, assignment: Assignment, u: int, v: int) -> tuple[int, int]:
    a = problem.layers[u].layout[assignment.strategy[u]]
    b = problem.layers[v].layout[assignment.strategy[v]]
    return int(a), int(b)


def _inside(problem: Problem, assignment: Assignment, i: int) -> float:
    """Re-sharding seconds inside stage i."""
    total = 0.0
    for edge in problem.edges:
        first, last = assignment.stage[edge.source], assignment.stage[edge.target]
        if first == last and first % problem.num_stages == i:
            total += float(edge.reshard_s[_layouts(problem, assignment, edge.source, edge.target)])
    return total


def _across(problem: Problem, assignment: Assignment, j: int) -> float:
    """Seconds of the link between stages j and j + 1, crossed once."""
    total = 0.0
    for edge in problem.edges:
        if assignment.stage[edge.source] <= j < assignment.stage[edge.target]:
            total += float(edge.send_s[_layouts(problem, assignment, edge.source, edge.target)])
    return total


def _in_order(assignment: Assignment, count: int) -> bool:
    """Whether the stages are 0, …, count - 1 in runs."""
    runs = [s for u, s in enumerate(assignment.stage) if u == 0 or s != assignment.stage[u - 1]]
    return runs == list(range(count))
