r"""Lower bounds on whole plans, from lower bounds on their stages.

TPI >= rest + p + (c - 1) max(T, p) + max(H, G) for a stage with micro-batch seconds p and once-a-step seconds G, where
``rest`` bounds the other stages and links, and T and H the two maxima. Four linear consequences are used, each with
its own weight omega on G, for which :mod:`uniap_tune.intervals` bounds p + omega G:

    omega = 0     p + (c - 1) max(T, p) + H  <=  what the rest leaves
    omega = 1/c   c (p + G / c)              <=  what the rest leaves
    omega = 1     p + G + (c - 1) T          <=  what the rest leaves
    omega = 1/N   p + G / N + (c - 1) T      <=  what the rest leaves, itself counted with G / N of every stage

The last because the largest of N once-a-step times is at least their mean: it keeps the sum and the largest from
being bounded by different plans.

A budget on the TPI forbids stages, fewer stages raise the bounds, and higher bounds forbid more: :func:`tighten`
repeats that until nothing changes, or nothing is left, which proves that no plan is within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from uniap_tune.intervals import StageBounds, stage_bounds
from uniap_tune.problem import FloatArray, Problem

# Rounds of tightening; the first few do nearly all.
_MOST_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class ChainBounds:
    """Bounds of a chain problem.

    Attributes:
        weights: [W] omega.
        stages: for each stage its :class:`StageBounds` (shared between equal in-flight counts).
        link: [n + 1] least seconds of the link before layer b (0 at both ends).
        forward: [2, N + 1, n + 1] least seconds of stages and links before stage i when it begins at layer a,
            the link into it included; the second with G / N of every stage.
        backward: [2, N + 1, n + 1] least seconds of stages i.. and links when stage i begins at layer a, likewise.
        least_transient: [n] least transient bytes of each layer.
        slowest: bound on the slowest stage or link.
        once: bound on the largest once-a-step time.
        total: bound on TPI.
    """

    weights: FloatArray
    stages: tuple[StageBounds, ...]
    link: FloatArray
    forward: FloatArray
    backward: FloatArray
    least_transient: FloatArray
    slowest: float
    once: float
    total: float

    def through(self, stage: int, c: int) -> FloatArray:
        """[n + 1, n + 1] bound on the TPI of every plan in which ``stage`` holds layers [a, b)."""
        rest, spread_rest = self.forward[:, stage, :, None] + (self.link + self.backward[:, stage + 1])[:, None, :]
        p, joint, both, spread = self.lower_of(stage)
        repeated = (c - 1) * np.maximum(p, self.slowest) if c > 1 else 0.0  # p may be infinite
        best: FloatArray = rest + p + repeated + self.once
        best = np.maximum(best, rest + c * joint)
        best = np.maximum(best, rest + both + (c - 1) * self.slowest)
        bounded: FloatArray = np.maximum(best, spread_rest + spread + repeated)
        return bounded

    def lower_of(self, stage: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Stage bounds for omega = 0, 1/c, 1, 1/N (all the first one without once-a-step times)."""
        lower = self.stages[stage].lower
        return (lower[0], lower[1], lower[2], lower[3]) if len(lower) == 4 else (lower[0],) * 4


def chain_bounds(problem: Problem) -> ChainBounds:
    """All bounds of a chain; O(N n^2) numpy work."""
    has_once = any(table.step_time_s.any() for table in problem.layers)
    weights = [0.0, 1.0 / problem.num_microbatches, 1.0, 1.0 / problem.num_stages] if has_once else [0.0]
    by_flight: dict[int, StageBounds] = {}
    for i in range(problem.num_stages):
        flight = problem.in_flight(i)
        if flight not in by_flight:
            by_flight[flight] = stage_bounds(problem, flight, np.array(weights))
    return combine(problem, np.array(weights), [by_flight[problem.in_flight(i)] for i in range(problem.num_stages)])


def combine(problem: Problem, weights: FloatArray, stages: Sequence[StageBounds]) -> ChainBounds:
    """Bounds on whole plans from those on their stages."""
    c = problem.num_microbatches
    link = np.zeros(problem.num_layers + 1)
    for u, edge in problem.chain_edges.items():
        link[u + 1] = edge.send_s.min()
    lowers = [s.lower[0] for s in stages]
    spread = [s.lower[-1] for s in stages]
    forward = np.stack([_forward(lowers, link), _forward(spread, link)])
    backward = np.stack([_backward(lowers, link), _backward(spread, link)])
    slowest = _bottleneck(lowers, link)
    once = 0.0
    if len(weights) > 1:
        once = _bottleneck([_least_once(problem, s) for s in stages], np.zeros_like(link))
    least = float(backward[0, 0, 0])
    total = least + (c - 1) * slowest + once if np.isfinite(least) else float("inf")
    transient = np.array([float(t.transient_bytes.min()) for t in problem.layers])
    found = ChainBounds(weights, tuple(stages), link, forward, backward, transient, slowest, once, total)
    for i in range(problem.num_stages):  # every plan passes through some interval of every stage
        total = max(total, float(found.through(i, c).min()))
    return replace(found, total=total)


def tighten(problem: Problem, bounds: ChainBounds, budget: float) -> ChainBounds | None:
    """The bounds of plans with a TPI of at most ``budget``; ``None`` if there is none."""
    c = problem.num_microbatches
    left = None
    for _ in range(_MOST_ROUNDS):
        if bounds.total > budget:
            return None
        masks = [bounds.through(i, c) <= budget for i in range(problem.num_stages)]
        count = sum(int(mask.sum()) for mask in masks)
        if count == left:
            break
        left = count
        stages = [
            replace(stage, lower=np.where(mask[None], stage.lower, np.inf))
            for stage, mask in zip(bounds.stages, masks, strict=True)
        ]
        bounds = combine(problem, bounds.weights, stages)
    return bounds


def _least_once(problem: Problem, stage: StageBounds) -> FloatArray:
    """[n + 1, n + 1] the sum of the layers' least g, with memory and the leading rule left out."""
    least = np.concatenate([[0.0], np.cumsum([float(t.step_time_s.min()) for t in problem.layers])])
    return np.where(np.isfinite(stage.lower[0]), least[None, :] - least[:, None], np.inf)


def _forward(lowers: list[FloatArray], link: FloatArray) -> FloatArray:
    n = len(link) - 1
    result = np.full((len(lowers) + 1, n + 1), np.inf)
    result[0, 0] = 0.0
    for i, lower in enumerate(lowers):
        result[i + 1] = (result[i][:, None] + lower).min(axis=0) + link
    return result


def _backward(lowers: list[FloatArray], link: FloatArray) -> FloatArray:
    n = len(link) - 1
    result = np.full((len(lowers) + 1, n + 1), np.inf)
    result[-1, n] = 0.0
    for i in range(len(lowers) - 1, -1, -1):
        after = result[i + 1] + (link if i + 1 < len(lowers) else 0.0)
        result[i] = (lowers[i] + after[None, :]).min(axis=1)
    # the link into stage i belongs to ``forward``; the links after it are inside
    return result


def _bottleneck(lowers: list[FloatArray], link: FloatArray) -> float:
    """Least possible maximum over stages (and links between them); 0 when nothing fits at all."""
    n = len(link) - 1
    reach = np.full(n + 1, np.inf)
    reach[0] = 0.0
    for i, lower in enumerate(lowers):
        reach = np.maximum(reach[:, None], lower).min(axis=0)
        if i + 1 < len(lowers):
            reach = np.maximum(reach, link)
    return float(reach[n]) if np.isfinite(reach[n]) else 0.0
