"""Models and clusters so small that everything the search space allows can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tests.oracle import brute_force
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.cost.model import CostModel
from uniap_tune.feasibility import least_peak
from uniap_tune.formulate import Pricer
from uniap_tune.graph import build_graph
from uniap_tune.problem import Problem
from uniap_tune.replay import judged_seconds
from uniap_tune.solvers import solve_interleaved
from uniap_tune.space import Family, Knobs, Space, parse_knobs
from uniap_tune.spec import Job, Model
from uniap_tune.strategy import CAPABILITIES, Target

UNLIMITED = 1e15


def tiny_model(num_layers: int = 3, hidden_size: int = 256, vocab_size: int = 1024, name: str = "tiny") -> Model:
    """A llama with four heads."""
    return Model(
        name=name,
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        num_heads=4,
        num_kv_heads=4,
        head_dim=hidden_size // 4,
        vocab_size=vocab_size,
    )


@dataclass(frozen=True)
class Tiny:
    """A space and its prices."""

    space: Space
    pricer: Pricer

    def with_limit(self, limit_bytes: float) -> Tiny:
        """The same prices under another memory limit."""
        return Tiny(self.space, self.pricer.with_limit(limit_bytes))

    def problems(self) -> Iterator[tuple[int, int, Family, Problem]]:
        """Every problem of the space: every (pp, c), family, and number of leading recomputed blocks."""
        for pp in self.space.pipeline_sizes():
            for c in self.space.microbatch_counts():
                for family in self.space.families(pp, c):
                    counts = range(1, self.space.model.num_layers + 1) if family.leading else (0,)
                    for count in counts:
                        yield pp, c, family, self.pricer.formulate(pp, c, family, leading=count).problem

    def best_by_pair(self) -> dict[tuple[int, int], float]:
        """Of each (pp, c) the least objective, by brute force; ``inf`` where nothing fits."""
        best: dict[tuple[int, int], float] = {}
        for pp, c, family, problem in self.problems():
            best[pp, c] = min(best.get((pp, c), math.inf), self.least(pp, c, family, problem))
        return best

    def least(self, pp: int, c: int, family: Family, problem: Problem) -> float:
        """The least objective by brute force; with virtual stages what the cut of least closed form is judged by."""
        if problem.virtual_stages == 1:
            return brute_force(problem)
        cut = solve_interleaved(problem).assignment
        count = problem.leading.count if problem.leading is not None else 0
        made = self.pricer.formulate(pp, c, family, leading=count)
        return math.inf if cut is None else judged_seconds(made, cut)

    def peaks(self) -> tuple[float, float]:
        """Least and most of the least bytes that the problems need."""
        peaks = [least_peak(problem) for _, _, _, problem in self.problems()]
        return min(peaks), max(p for p in peaks if math.isfinite(p))


def tiny(
    target: Target,
    *,
    num_layers: int = 3,
    hidden_size: int = 256,
    vocab_size: int = 1024,
    cluster: str = "1x2:a100-80gb",
    global_batch: int = 4,
    seq_length: int = 512,
    fix: tuple[str, ...] = (),
    maximum: tuple[str, ...] = (),
    forbid: tuple[str, ...] = (),
    limit_bytes: float = UNLIMITED,
) -> Tiny:
    """A tiny job; by default with all the memory in the world."""
    knobs: Knobs = parse_knobs(list(fix), list(maximum), list(forbid))
    model, place = tiny_model(num_layers, hidden_size, vocab_size), read_cluster(cluster)
    job, capabilities = Job(global_batch=global_batch, seq_length=seq_length), CAPABILITIES[target]
    costs = CostModel(model, place, job, capabilities)
    pricer = Pricer(build_graph(model), costs, global_batch, limit_bytes)
    return Tiny(Space(model=model, cluster=place, job=job, capabilities=capabilities, knobs=knobs), pricer)
