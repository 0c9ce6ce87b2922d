"""Stage columns by label setting: every useful way to run layers [a, b) as one stage, and nothing dominated.

A label is a choice of strategies for a prefix of a stage: seconds of a micro-batch (t), bytes held (m), largest
transient (w), bytes of the update (s), seconds once a step (g), and the layouts at both borders. Extending it by a
layer adds that layer's costs. One label can replace another with the same border layouts in any plan, at no higher
TPI, if it is <= in

    m          bytes held,
    m + w      bytes at the peak of the layers so far (a later, larger transient replaces both alike),
    s          bytes while the optimizer runs (where it can bind at all),
    t          TPI grows with t at least at rate 1,
    t + g      and with g at most at rate 1,

so only the Pareto set of these is kept. Labels are shared by *sequences of layer types* through a trie: equal
runs of layers are built once for each in-flight count, not once for each place.

With a budget (an upper bound on the TPI worth finding) labels that no completion can bring under it are dropped
by the Lagrangian bounds of :mod:`uniap_tune.intervals`; that keeps the sets small and loses nothing under the budget.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from uniap_tune.bounds import ChainBounds
from uniap_tune.deadline import Deadline
from uniap_tune.intervals import StageBounds
from uniap_tune.labels import Labels, Node
from uniap_tune.pareto import pareto
from uniap_tune.problem import MEMORY_SLACK, BoolArray, FloatArray, IntArray, LayerTable, Problem

# Relative slack on budgets, far above the rounding of the sums involved and far below any gap of interest.
BUDGET_SLACK = 1e-11


@dataclass(frozen=True, eq=False, slots=True)
class Column:
    """The useful ways to run layers [first, last) on a stage: [J] arrays; ``node`` and ``index`` recover them."""

    first: int
    last: int
    node: Node
    index: IntArray
    t: FloatArray
    g: FloatArray
    entry: IntArray
    exit: IntArray


class ColumnBuilder:
    """Builds the columns of one chain problem.

    Args:
        problem: a chain.
        bounds: its bounds.
        scalar: keep only what is best in t + omega g for this one of the bounds' weights, to bound intervals exactly.
    """

    def __init__(self, problem: Problem, bounds: ChainBounds, *, scalar: int | None = None) -> None:
        self.problem = problem
        self.bounds = bounds
        self.scalar = scalar
        self._keys = [self._key(u) for u in range(problem.num_layers)]
        self._entries = [self._entry_classes(u) for u in range(problem.num_layers)]
        self._undominated: dict[tuple[int, int], IntArray] = {}
        self._multipliers = {problem.in_flight(i): stage.multipliers for i, stage in enumerate(bounds.stages)}
        self._updates = any(table.step_bytes.any() for table in problem.layers)

    def build(
        self, allowed: Sequence[BoolArray], budget: float, deadline: Deadline, beam: int | None = None
    ) -> list[list[Column]]:
        """The columns of every stage.

        Args:
            allowed: for each stage [n + 1, n + 1], whether it may hold layers [a, b).
            budget: seconds; plans with a higher TPI may be left out (``inf``: none is).
            beam: keep only about this many labels a node: fast, no longer exact.
        """
        result: list[list[Column]] = []
        flights: dict[int, list[int]] = {}
        for i in range(self.problem.num_stages):
            flights.setdefault(self.problem.in_flight(i), []).append(i)
        by_stage: dict[int, list[Column]] = {}
        for flight, stages in flights.items():
            roots: dict[Hashable, Node] = {}
            places: list[tuple[int, int, int, Node]] = []
            for i in stages:
                for a in np.flatnonzero(allowed[i].any(axis=1)).tolist():
                    places.extend(self._plant(roots, i, a, allowed[i][a], budget))
            for root in roots.values():
                self._grow(root, flight, deadline, beam)
            for i, a, b, node in places:
                column = self._column(node, a, b)
                if column is not None:
                    by_stage.setdefault(i, []).append(column)
        for i in range(self.problem.num_stages):
            result.append(by_stage.get(i, []))
        return result

    # -- the trie -----------------------------------------------------------------------------------------------

    def _key(self, u: int) -> Hashable:
        """What makes layer u, entered from its neighbour, equal to another."""
        edge = self.problem.chain_edges.get(u - 1)
        rule = self.problem.leading
        marks = (rule.counted[u], id(rule.leading[u])) if rule is not None else None
        return (id(self.problem.layers[u]), id(edge.reshard_s) if edge is not None else None, marks)

    def _entry_classes(self, u: int) -> IntArray:
        """[G] layouts of layer u merged where the link into it costs the same from everywhere."""
        edge = self.problem.chain_edges.get(u - 1)
        if edge is None:
            return np.zeros(self.problem.num_layouts, dtype=np.int64)
        return _classes(edge.send_s.T, self.problem.layers[u].layout, self.problem.layers[u - 1].layout)

    def _plant(
        self, roots: dict[Hashable, Node], i: int, a: int, ends: BoolArray, budget: float
    ) -> list[tuple[int, int, int, Node]]:
        """Add the path of stage i beginning at layer a to the trie, with the caps its intervals need."""
        caps, spare = self._caps(i, a, ends, budget)
        floor = self._floors(a, ends)
        entries = self._entries[a]
        key: Hashable = (id(self.problem.layers[a]), self._keys[a] if self.problem.leading else 0, entries.tobytes())
        node = roots.get(key)
        if node is None:
            node = roots[key] = Node(a, a, None)
        found = []
        last = int(np.flatnonzero(ends)[-1])
        for b in range(a + 1, last + 1):
            _loosen(node, caps[..., b - a - 1] if caps is not None else None, float(spare[b - a - 1]))
            node.floor = min(node.floor, float(floor[b - a - 1]))
            if ends[b]:
                found.append((i, a, b, node))
            if b < last:
                child = node.down.get(self._keys[b])
                if child is None:
                    child = node.down[self._keys[b]] = Node(b, a, node)
                node = child
        return found

    def _caps(self, i: int, a: int, ends: BoolArray, budget: float) -> tuple[FloatArray | None, FloatArray]:
        """After layers [a, u): [G, W, Z, u] caps on t + omega g + lambda m, [u] on m; u = a + 1 .. last end."""
        bounds, problem = self.bounds, self.problem
        stage: StageBounds = bounds.stages[i]
        limit, c = problem.memory_limit_bytes, problem.num_microbatches
        last = int(np.flatnonzero(ends)[-1])
        after = slice(a + 1, last + 1)
        open_ends = np.where(ends[after], 0.0, -np.inf)
        if problem.leading is not None:
            return None, np.full(last - a, np.inf)
        need = stage.mixed.leanest[after]
        spare = limit * (1 + 1e-9) + need + _running_max(open_ends - need)
        if math.isinf(budget):
            return None, spare
        rest = bounds.forward[:, i, a, None] + (bounds.link + bounds.backward[:, i + 1])[:, after]
        left, spread = budget * (1 + BUDGET_SLACK) - rest
        both = left - (c - 1) * bounds.slowest
        slower = np.minimum((left - bounds.once) / c, both - bounds.once)
        cap = np.stack([slower, left / c, both, spread - (c - 1) * bounds.slowest])
        cap = cap[: len(bounds.weights)] + open_ends
        goal = cap[:, None, :] + (stage.multipliers * limit)[None, :, None]
        mixed = stage.mixed.reduced[:, :, after]
        changing = _running_max(goal - mixed) + mixed - stage.move
        caps = np.empty((problem.num_layouts, *goal.shape))
        for layout, sums in enumerate(stage.single):
            caps[layout] = changing
            if sums is not None:
                own = sums.reduced[:, :, after]
                # an end is out of reach from where a layer without this layout lies between
                reach = sums.impossible[after]
                staying = _running_max_while(goal - own, reach) + own
                caps[layout] = np.maximum(changing, staying)
        return caps, spare

    def _floors(self, a: int, ends: BoolArray) -> FloatArray:
        """[u] after layers [a, u): a transient that every completion to an allowed end has, u = a + 1 .. last end."""
        least = self.bounds.least_transient
        last = int(np.flatnonzero(ends)[-1])
        floors = np.zeros(last - a)
        coming = 0.0
        for u in range(last, a, -1):
            coming = 0.0 if ends[u] else max(coming, float(least[u]))
            floors[u - a - 1] = coming
        return floors

    # -- label setting --------------------------------------------------------------------------------------------

    def _grow(self, root: Node, flight: int, deadline: Deadline, beam: int | None) -> None:
        stack = [root]
        while stack:
            deadline.check()
            node = stack.pop()
            node.labels = self._extend(node, flight, beam)
            if len(node.labels):
                stack.extend(node.down.values())

    def _extend(self, node: Node, flight: int, beam: int | None) -> Labels:
        """The labels of a node: those above it, each with every strategy of its layer, pruned."""
        problem, u = self.problem, node.layer
        table = problem.layers[u]
        usable = self._usable(table, flight)
        if problem.leading is not None:
            usable = usable[problem.leading.allowed(u, node.first)[usable]]
        held = table.bytes_in_flight(flight)[usable]
        time_s, step_s = table.time_s[usable], table.step_time_s[usable]
        transient, layout = table.transient_bytes[usable], table.layout[usable]
        update = table.update_bytes[usable]
        if node.up is None:
            zero = np.zeros(len(usable), dtype=np.int64)
            entry = self._entries[u][layout]
            labels = Labels(time_s, held, transient, update, step_s, entry, layout, zero, usable)
        else:
            above = node.up.labels
            assert above is not None
            edge = problem.chain_edges.get(u - 1)
            move = edge.reshard_s[above.layout[:, None], layout[None, :]] if edge is not None else 0.0
            rows, columns = np.divmod(np.arange(len(above) * len(usable)), max(len(usable), 1))
            # evaluate() adds layer times first and re-sharding later; the order differs only in rounding
            labels = Labels(
                (above.t[:, None] + time_s[None, :] + move).ravel(),
                (above.m[:, None] + held[None, :]).ravel(),
                np.maximum(above.w[:, None], transient[None, :]).ravel(),
                (above.s[:, None] + update[None, :]).ravel(),
                (above.g[:, None] + step_s[None, :]).ravel(),
                above.entry[rows],
                layout[columns],
                rows,
                usable[columns],
            )
        return self._prune(labels, node, flight, beam)

    def _prune(self, labels: Labels, node: Node, flight: int, beam: int | None) -> Labels:
        limit = self.problem.memory_limit_bytes
        most = limit * (1 + MEMORY_SLACK)
        peak = labels.m + np.maximum(labels.w, node.floor)
        keep = (peak <= most) & (labels.m <= node.spare) & (labels.s <= most)
        labels, peak = labels.take(keep), peak[keep]
        slack = self._slack(labels, peak, node, flight)
        if slack is not None:
            keep = slack >= 0
            labels, peak, slack = labels.take(keep), peak[keep], slack[keep]
        columns = [*self._prices(labels.t, labels.g), labels.m, peak, *([labels.s] if self._updates else [])]
        criteria = np.stack(columns, axis=1)
        group = labels.entry * self.problem.num_layouts + labels.layout
        front = pareto(criteria, group)
        if beam is not None:
            front = front[_beam(labels.m[front], None if slack is None else slack[front], group[front], beam)]
        return labels.take(front)

    def _slack(self, labels: Labels, peak: FloatArray, node: Node, flight: int) -> FloatArray | None:
        """[N] seconds by which the best completion of a label stays under the budget, by the tightest bound."""
        if node.caps is None:
            return None
        multipliers = self._multipliers[flight]
        caps = node.caps + BUDGET_SLACK * np.abs(node.caps)
        least = np.full(len(labels), np.inf)
        for number, (omega, rows) in enumerate(zip(self.bounds.weights, caps.swapaxes(0, 1), strict=True)):
            if self.scalar not in (None, number):
                continue  # a label dropped by another cap could dominate one that is not
            value = (labels.t + omega * labels.g)[:, None] + peak[:, None] * multipliers[None, :]
            least = np.minimum(least, (rows[labels.layout] - value).min(axis=1))
        return least

    def _prices(self, t: FloatArray, g: FloatArray) -> list[FloatArray]:
        """The criteria of seconds: a single stage pays exactly c t + g, others between t and c t, and at most g."""
        if self.scalar is not None:
            return [t + self.bounds.weights[self.scalar] * g]
        if self.problem.num_stages == 1:
            return [self.problem.num_microbatches * t + g]
        return [t, t + g]

    def _usable(self, table: LayerTable, flight: int) -> IntArray:
        """Strategies of a layer that no other with the same layout dominates (all of them under a leading rule)."""
        key = (id(table), flight)
        if key not in self._undominated:
            if self.problem.leading is not None:
                kept = np.arange(table.num_strategies)
            else:
                held = table.bytes_in_flight(flight)
                prices = self._prices(table.time_s, table.step_time_s)
                columns = [*prices, held, held + table.transient_bytes]
                if self._updates:
                    columns.append(table.update_bytes)
                kept = np.sort(pareto(np.stack(columns, axis=1), table.layout))
            self._undominated[key] = kept
        return self._undominated[key]

    def _column(self, node: Node, a: int, b: int) -> Column | None:
        """The labels of a node as a column: memory no longer matters, only what a plan pays for."""
        labels = node.labels
        if labels is None or not len(labels):
            return None
        edge = self.problem.chain_edges.get(b - 1)
        leave = np.zeros_like(labels.layout) if edge is None else _exit_classes(self.problem, b)[labels.layout]
        group = labels.entry * self.problem.num_layouts + leave
        index = pareto(np.stack(self._prices(labels.t, labels.g), axis=1), group)
        chosen = labels.take(index)
        return Column(a, b, node, index, chosen.t, chosen.g, chosen.entry, leave[index])


def _exit_classes(problem: Problem, b: int) -> IntArray:
    """[G] layouts of layer b - 1 merged where the link out of it costs the same to everywhere."""
    edge = problem.chain_edges[b - 1]
    return _classes(edge.send_s, problem.layers[b - 1].layout, problem.layers[b].layout)


def _classes(cost: FloatArray, own: IntArray, other: IntArray) -> IntArray:
    """[G] for each of our own layouts the first of them whose costs to all of the other side's layouts are equal.

    Representatives are layouts in use: the cost between two of them is then the cost between their classes.
    """
    used = np.unique(own)
    _, first, inverse = np.unique(cost[np.ix_(used, np.unique(other))], axis=0, return_index=True, return_inverse=True)
    result = np.arange(len(cost))
    result[used] = used[first[inverse.ravel()]]
    return result


def _beam(size: FloatArray, slack: FloatArray | None, group: IntArray, width: int) -> IntArray:
    """Of each group the most promising: by slack, or without a budget evenly spread by memory; and the leanest."""
    kept = []
    for name in np.unique(group):
        members = np.flatnonzero(group == name)
        if len(members) > width:
            by_size = members[np.argsort(size[members], kind="stable")]
            if slack is None:
                chosen = by_size[np.linspace(0, len(by_size) - 1, width).round().astype(np.int64)]
            else:
                chosen = members[np.argsort(-slack[members], kind="stable")[:width]]
            members = np.unique(np.append(chosen, by_size[0]))
        kept.append(members)
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def _running_max(values: FloatArray) -> FloatArray:
    """Maximum over this place and all later ones, along the last axis."""
    return np.maximum.accumulate(values[..., ::-1], axis=-1)[..., ::-1]


def _running_max_while(values: FloatArray, level: FloatArray) -> FloatArray:
    """As :func:`_running_max`, over those later places where the rising ``level`` is still what it is here."""
    result = np.full_like(values, -np.inf)
    for value in np.unique(level):
        same = level == value
        result[..., same] = _running_max(values[..., same])
    return result


def _loosen(node: Node, caps: FloatArray | None, spare: float) -> None:
    """A node serves several places: keep the loosest of their caps."""
    if caps is not None:
        node.caps = caps if node.caps is None else np.maximum(node.caps, caps)
    node.spare = max(node.spare, spare)
