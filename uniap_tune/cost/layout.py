"""Re-sharding of activations between layouts: a metric, which the aggregated formulation needs.

Under a layout a rank holds a box of (samples, sequence positions). Moving from layout a to layout b it must receive
the part of its new box it does not hold: |B_b \\ B_a|. Set differences obey |C \\ A| <= |C \\ B| + |B \\ A|, so the
largest one over ranks does too, and so does the same figure for the boxes of whole domains, which is what crosses
the network. Forward moves a -> b and backward moves gradients b -> a: the sum is symmetric, zero only for equal
layouts once each move also pays a latency. One layer visited in between can therefore never make a move cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uniap_tune.strategy import Layout


@dataclass(frozen=True, slots=True)
class Move:
    """A move there and back: the fraction of the micro-batch's activations received by the busiest rank, and by
    the busiest domain over the network."""

    rank: float
    domain: float


_NO_MOVE = Move(0.0, 0.0)
_Box = tuple[float, float, float, float]  # samples from, to; positions from, to; all in 0..1


def move(source: Layout, target: Layout, domain: int) -> Move:
    """Activations that must move from ``source`` to ``target`` and back.

    The outermost axis is dp: a common factor of both dp degrees cuts the problem into equal blocks, one of which
    (rounded to whole domains) stands for all.
    """
    if source == target:
        return _NO_MOVE
    devices = source.tp * source.cp * source.dp
    block = devices // math.gcd(source.dp, target.dp)
    # Blocks that fill domains evenly are alike; otherwise take whole periods of blocks and domains.
    period = block if domain % block == 0 else min(devices, math.lcm(block, domain))
    there = back = 0.0
    for rank in range(period):
        old, new = _box(source, rank), _box(target, rank)
        there = max(there, _difference(new, old))
        back = max(back, _difference(old, new))
    crossing = 0.0
    if domain % block:
        out = home = 0.0
        for first in range(0, period, domain):
            last = min(first + domain, devices) - 1
            old, new = _hull(source, first, last), _hull(target, first, last)
            out = max(out, _difference(new, old))
            home = max(home, _difference(old, new))
        crossing = out + home
    return Move(there + back, crossing)


def _box(layout: Layout, rank: int) -> _Box:
    """The box of a rank in the order tp, cp, dp; sequence parallelism cuts the positions of a cp rank by tp."""
    tp_rank = rank % layout.tp
    cp_rank = rank // layout.tp % layout.cp
    dp_rank = rank // (layout.tp * layout.cp)
    first, last = cp_rank / layout.cp, (cp_rank + 1) / layout.cp
    if layout.sequence_parallel:
        width = (last - first) / layout.tp
        first, last = first + tp_rank * width, first + (tp_rank + 1) * width
    return dp_rank / layout.dp, (dp_rank + 1) / layout.dp, first, last


def _hull(layout: Layout, first: int, last: int) -> _Box:
    """The smallest box around what ranks ``first`` to ``last`` hold."""
    a, b = _box(layout, first), _box(layout, last)
    if last - first + 1 >= layout.tp * layout.cp or a[0] != b[0]:
        return a[0], b[1], 0.0, 1.0
    if last - first + 1 >= layout.tp:
        return a[0], b[1], (first // layout.tp % layout.cp) / layout.cp, (last // layout.tp % layout.cp + 1) / layout.cp
    return a[0], b[1], min(a[2], b[2]), max(a[3], b[3])


def _difference(box: _Box, other: _Box) -> float:
    """Area of ``box`` outside ``other``."""
    samples = min(box[1], other[1]) - max(box[0], other[0])
    positions = min(box[3], other[3]) - max(box[2], other[2])
    common = max(0.0, samples) * max(0.0, positions)
    return max(0.0, (box[1] - box[0]) * (box[3] - box[2]) - common)
