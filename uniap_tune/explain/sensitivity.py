"""How the answer moves with what it was made from: the network, the memory, the batch. Each by planning again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from uniap_tune.deadline import Deadline
from uniap_tune.errors import InputError
from uniap_tune.formulate import Pricer
from uniap_tune.plan import Plan
from uniap_tune.planner import Planning, Request, attempt
from uniap_tune.problem import Status
from uniap_tune.units import format_bytes

NETWORK = "inter-node network"
MEMORY = "usable memory"
BATCH = "global batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The best plan where one thing is different.

    Attributes:
        changed: what is different: :data:`NETWORK`, :data:`MEMORY` or :data:`BATCH`.
        factor: how many times what there is.
        value: what it is then, for people.
        plan: the best plan then; ``None`` if there is none.
        why_none: why there is none.
        faster: relative change of the tokens a second.
    """

    changed: str
    factor: float
    value: str
    plan: Plan | None
    why_none: str = ""
    faster: float = 0.0


def sensitivities(planning: Planning, deadline: Deadline | None = None) -> tuple[Sensitivity, ...]:
    """The network between nodes halved and doubled, memory 10% less and more, the batch halved and doubled.

    What time runs out for is left out.
    """
    found = []
    for changed, factor, value, request, prices in _changes(planning):
        try:
            other = attempt(request, prices=prices, deadline=deadline)
        except InputError as error:
            found.append(Sensitivity(changed=changed, factor=factor, value=value, plan=None, why_none=error.what))
            continue
        if other.result.status is Status.OPTIMAL:
            faster = other.plan.tokens_per_s / planning.plan.tokens_per_s - 1
            found.append(Sensitivity(changed=changed, factor=factor, value=value, plan=other.plan, faster=faster))
        elif other.result.status is Status.INFEASIBLE:
            found.append(Sensitivity(changed=changed, factor=factor, value=value, plan=None, why_none="nothing fits"))
    return tuple(found)


def _changes(planning: Planning) -> Iterator[tuple[str, float, str, Request, Pricer | None]]:
    """What changes, the factor, the new value, the new request, and the prices that still hold."""
    request, cluster, job = planning.request, planning.request.cluster, planning.request.job
    if cluster.num_nodes > 1:
        for factor in (0.5, 2.0):
            link = replace(cluster.inter, bandwidth=factor * cluster.inter.bandwidth)
            total = link.bandwidth * cluster.rails_per_node
            value = f"{total / 1e9:.0f} GB/s a node"
            yield NETWORK, factor, value, replace(request, cluster=replace(cluster, inter=link)), None
    for factor in (0.9, 1.1):
        limit = factor * request.memory_limit_bytes
        yield MEMORY, factor, format_bytes(limit), request.with_memory_limit(limit), planning.prices
    for factor in (0.5, 2.0):
        batch = factor * job.global_batch
        if batch.is_integer():
            value = f"{batch:.0f} samples"
            yield BATCH, factor, value, replace(request, job=replace(job, global_batch=int(batch))), None
