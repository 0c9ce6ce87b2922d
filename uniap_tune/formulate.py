"""Prices -> :class:`~uniap_tune.problem.Problem`: one (pp, c) and one family of strategies as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import LayerCost
from uniap_tune.graph import Graph, LayerKind, LayerType
from uniap_tune.problem import EdgeTable, FloatArray, LayerTable, LeadingRule, Problem
from uniap_tune.schedule import Schedule
from uniap_tune.space import Family
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Layout, Strategy


@dataclass(frozen=True, eq=False)
class Formulation:
    """A problem and what its indices mean: for each layer its strategies and their priced parts."""

    problem: Problem
    strategies: tuple[tuple[Strategy, ...], ...]
    costs: tuple[tuple[LayerCost, ...], ...]


class Pricer:
    """Prices layers and borders once and hands out problems built from them.

    Args:
        graph: the model's layers.
        costs: the cost model.
        global_batch: samples of a step.
        limit_bytes: bytes of a device that layers may use.
    """

    def __init__(self, graph: Graph, costs: CostModel, global_batch: int, limit_bytes: float) -> None:
        self.graph = graph
        self.costs = costs
        self.global_batch = global_batch
        self.limit_bytes = limit_bytes
        self.type_counts = Counter(layer.type for layer in graph.layers)
        self.num_blocks = sum(count for kind, count in self.type_counts.items() if kind.kind is LayerKind.BLOCK)
        self._layers: dict[tuple[LayerType, Strategy, int, int, int, int], LayerCost] = {}
        self._borders: dict[tuple[tuple[Layout, ...], int, int], tuple[FloatArray, FloatArray]] = {}

    def with_limit(self, limit_bytes: float) -> Pricer:
        """The same prices under another memory limit; what either prices, both know."""
        other = Pricer(self.graph, self.costs, self.global_batch, limit_bytes)
        other._layers, other._borders = self._layers, self._borders
        return other

    def cost(self, layer: LayerType, strategy: Strategy, pp: int, c: int, virtual_stages: int = 1) -> LayerCost:
        """One layer under one strategy, with c micro-batches in a pipeline of pp stages."""
        samples = self.global_batch // (c * strategy.dp)
        key = (layer, strategy, samples, pp, c, virtual_stages)
        found = self._layers.get(key)
        if found is None:
            # A stage holds its buffers once; charged with the transients, of which it pays the largest, they are
            # exact wherever the layers of a stage share a grid.
            buffers = self.costs.buffer_bytes(strategy, samples=samples, virtual_stages=virtual_stages)
            if virtual_stages == 1:
                found = self.costs.layer_cost(layer, strategy, samples=samples, pp=pp, num_microbatches=c)
            else:  # only the buffers differ
                found = self.cost(layer, strategy, pp, c)
                buffers -= self.costs.buffer_bytes(strategy, samples=samples)
            found = replace(found, transient_bytes=found.transient_bytes + buffers)
            self._layers[key] = found
        return found

    def least_send(self, pp: int, c: int, family: Family) -> float:
        """Seconds of the fastest border between stages."""
        return float(self._border(_layouts(family), pp, c)[1].min()) if pp > 1 else 0.0

    def formulate(
        self, pp: int, c: int, family: Family, *, leading: int = 0, schedule: Schedule = Schedule.ONE_F_ONE_B
    ) -> Formulation:
        """The problem of one (pp, c) and family; ``leading`` is N of a family that recomputes the first N blocks."""
        layouts = _layouts(family)
        place = {layout: index for index, layout in enumerate(layouts)}
        choices: dict[LayerType, tuple[Strategy, ...]] = {}
        costs: dict[LayerType, tuple[LayerCost, ...]] = {}
        tables: dict[LayerType, LayerTable] = {}
        for kind in dict.fromkeys(layer.type for layer in self.graph.layers):
            choices[kind] = family.strategies(kind)
            costs[kind] = tuple(self.cost(kind, s, pp, c, family.virtual_stages) for s in choices[kind])
            tables[kind] = _table([place[s.layout] for s in choices[kind]], costs[kind])
        types = [layer.type for layer in self.graph.layers]
        reshard, send = self._border(layouts, pp, c)
        problem = Problem(
            num_stages=pp,
            num_microbatches=c,
            schedule=schedule,
            memory_limit_bytes=self.limit_bytes,
            num_layouts=len(layouts),
            layers=tuple(tables[t] for t in types),
            edges=tuple(EdgeTable(u, v, reshard, send) for u, v in self.graph.edges),
            leading=_leading_rule(types, choices, leading) if family.leading else None,
            virtual_stages=family.virtual_stages,
        )
        return Formulation(problem, tuple(choices[t] for t in types), tuple(costs[t] for t in types))

    def _border(self, layouts: tuple[Layout, ...], pp: int, c: int) -> tuple[FloatArray, FloatArray]:
        key = (layouts, pp, c)
        if key not in self._borders:
            microbatch = self.global_batch // c
            reshard = [[self.costs.reshard_seconds(a, b, microbatch=microbatch) for b in layouts] for a in layouts]
            send = [[self.costs.send_seconds(a, b, microbatch=microbatch, pp=pp) for b in layouts] for a in layouts]
            self._borders[key] = (np.array(reshard), np.array(send))
        return self._borders[key]


def _layouts(family: Family) -> tuple[Layout, ...]:
    return tuple(sorted({s.layout for s in family.blocks}))


def _table(layout: Sequence[int], costs: Sequence[LayerCost]) -> LayerTable:
    def column(name: str) -> FloatArray:
        return np.array([getattr(cost, name) for cost in costs], dtype=np.float64)

    return LayerTable(
        layout=np.array(layout, dtype=np.int64),
        time_s=column("time"),
        step_time_s=column("step"),
        static_bytes=column("static"),
        microbatch_bytes=column("microbatch"),
        transient_bytes=column("transient_bytes"),
        step_bytes=column("step_bytes"),
    )


def _leading_rule(
    types: Sequence[LayerType], choices: dict[LayerType, tuple[Strategy, ...]], count: int
) -> LeadingRule:
    marks = {
        t: np.array([s.recompute is Recompute.FULL for s in strategies], dtype=np.bool_)
        for t, strategies in choices.items()
    }
    counted = tuple(t.kind is LayerKind.BLOCK for t in types)
    return LeadingRule(count, counted, tuple(marks[t] for t in types))
