"""What would make an infeasible job fit: the smallest step in each direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from uniap_tune.cost.model import CostModel
from uniap_tune.feasibility import least_peak
from uniap_tune.formulate import Pricer
from uniap_tune.lean import least_bytes
from uniap_tune.space import Family, Knobs, Space
from uniap_tune.spec import Cluster, Job, Recompute
from uniap_tune.units import GIB

_MOST_DOUBLINGS = 12
_ROUNDS = 10
# Least bytes are sums in another order than those of a plan.
_ROUNDING = 1e-11

_Fits = Callable[[Space], bool]


def memory_needed(space: Space, pricer: Pricer, *, enough: float = 0.0) -> float:
    """Least bytes of the fullest device over the leanest plans of a space; stops at the first within ``enough``.

    Memory falls with the micro-batch, with recompute and with ZeRO, so only the largest number of micro-batches and
    the most recompute of every grid are tried.
    """
    least = math.inf
    for pp in reversed(space.pipeline_sizes()):
        tried: set[Family] = set()
        for c in reversed(space.microbatch_counts()):
            for family in _leanest(space.families(pp, c)):
                if family in tried:
                    continue
                tried.add(family)
                bound = least_bytes(pricer, pp, c, family) * (1 - _ROUNDING)
                if bound >= least or bound > enough > 0:
                    continue  # no leaner, or not lean enough, by its prices alone
                least = min(least, least_peak(pricer.formulate(pp, c, family).problem))
                if least <= enough:
                    return least
    return least


def _leanest(families: list[Family]) -> Iterator[Family]:
    """For each grid the strategies with the most recompute, as one family."""
    modes = {s.recompute for family in families for s in family.blocks}
    most = next((m for m in (Recompute.FULL, Recompute.SELECTIVE, Recompute.NONE) if m in modes), None)
    for strategy in dict.fromkeys(s for family in families for s in family.blocks):
        if strategy.recompute is most:
            yield Family((strategy,))


def relaxations(space: Space, pricer: Pricer, limit_bytes: float) -> tuple[str, ...]:
    """One sentence for each change that alone makes a plan fit, in the order of how little it takes."""
    cluster, job = space.cluster, space.job

    def fits(changed: Space) -> bool:
        costs = CostModel(
            changed.model, changed.cluster, changed.job, changed.capabilities, runtime=pricer.costs.runtime
        )
        room = limit_bytes - costs.reserved_bytes()  # more nodes reserve more
        changed_pricer = Pricer(pricer.graph, costs, changed.job.global_batch, room)
        return memory_needed(changed, changed_pricer, enough=room) <= room

    found = [*_knob_changes(space, fits)]
    found += _recompute_change(space, job, fits)
    found += _batch_change(space, job, fits)
    found += _device_change(space, cluster, fits)
    found += _memory_change(space, pricer, limit_bytes)
    found += _sequence_change(space, job, fits)
    return tuple(found)


def _knob_changes(space: Space, fits: _Fits) -> Iterator[str]:
    knobs = space.knobs
    for knob, value in knobs.fix.items():
        freed = {k: v for k, v in knobs.fix.items() if k != knob}
        if fits(replace(space, knobs=replace(knobs, fix=freed))):
            yield f"without --fix {knob}={value}"
    for knob, cap in knobs.maximum.items():
        looser = {k: v for k, v in knobs.maximum.items() if k != knob}
        if fits(replace(space, knobs=replace(knobs, maximum=looser))):
            yield f"without --max {knob}={cap}"
    for knob, value in sorted(knobs.forbid):
        if fits(replace(space, knobs=replace(knobs, forbid=knobs.forbid - {(knob, value)}))):
            yield f"without --forbid {knob}={value}"
    several = len(knobs.fix) + len(knobs.maximum) + len(knobs.forbid) > 1
    if several and fits(replace(space, knobs=Knobs())):
        yield "without any --fix, --max or --forbid"


def _recompute_change(space: Space, job: Job, fits: _Fits) -> Iterator[str]:
    if Recompute.FULL not in job.allowed_recompute:
        relaxed = replace(job, allowed_recompute=job.allowed_recompute | {Recompute.FULL})
        if fits(replace(space, job=relaxed)):
            yield "with full recompute allowed"


def _batch_change(space: Space, job: Job, fits: _Fits) -> Iterator[str]:
    batch = job.global_batch
    while batch % 2 == 0:
        batch //= 2
        smaller = replace(space, job=replace(job, global_batch=batch))
        if fits(smaller):
            yield f"a global batch of {batch} instead of {job.global_batch}"
            return


def _device_change(space: Space, cluster: Cluster, fits: _Fits) -> Iterator[str]:
    """Few nodes: more and more until it fits, then halved between the last two.

    More nodes may fit worse, as the batch or the heads do not divide over some numbers: powers of two are tried too.
    """

    def enough(nodes: int) -> bool:
        return fits(replace(space, cluster=replace(cluster, num_nodes=nodes)))

    low = cluster.num_nodes
    doubled = {low << n for n in range(1, _MOST_DOUBLINGS + 1)}
    powers = {1 << n for n in range(low.bit_length(), low.bit_length() + _MOST_DOUBLINGS)}
    for high in sorted(doubled | powers):
        if enough(high):
            break
        low = high
    else:
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    yield f"{high * cluster.devices_per_node} devices ({high} nodes) instead of {cluster.num_devices}"


def _memory_change(space: Space, pricer: Pricer, limit_bytes: float) -> Iterator[str]:
    """Devices with more memory, of which the same part is usable."""
    needed = memory_needed(space, pricer)
    if math.isinf(needed):
        return
    device = space.cluster.device
    fraction = limit_bytes / device.memory_bytes
    memory = device.memory_bytes
    for _ in range(_ROUNDS):  # what is reserved grows with a device's memory, by a few percent of it
        larger = replace(space.cluster, device=replace(device, memory_bytes=memory))
        costs = CostModel(space.model, larger, space.job, space.capabilities, runtime=pricer.costs.runtime)
        memory = (needed + costs.reserved_bytes()) / fraction
    size = math.ceil(fraction * memory / GIB * 10) / 10
    yield f"devices with {size:.1f} GiB usable memory ({size * GIB / limit_bytes:.2f} times what there is)"


def _sequence_change(space: Space, job: Job, fits: _Fits) -> Iterator[str]:
    length = job.seq_length
    while length >= 256 and length % 2 == 0:
        length //= 2
        if fits(replace(space, job=replace(job, seq_length=length))):
            yield f"a sequence length of {length} instead of {job.seq_length} (this changes the training)"
            return
