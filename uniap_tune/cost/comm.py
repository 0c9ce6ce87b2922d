"""Collectives in the alpha-beta model over a two-level network (Thakur, Rabenseifner, Gropp 2005; NCCL's rings).

A cluster has NVLink (or PCIe) *domains* of ``Cluster.fast_domain`` devices joined by a network. A process group is
described by its size and its *stride*: Megatron's rank order is tp, cp, ep, dp, pp from the innermost outwards, so
a tp group has stride 1, a cp group stride tp, a dp group stride tp * cp and a pipeline stride W / pp.
All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.spec import Cluster


@dataclass(frozen=True, slots=True)
class Group:
    """A process group: ``size`` ranks, neighbours ``stride`` ranks apart."""

    size: int
    stride: int


class Network:
    """Prices collectives of process groups on one cluster."""

    def __init__(self, cluster: Cluster, efficiency: Efficiency) -> None:
        self._node = cluster.devices_per_node
        self._domain = min(cluster.fast_domain, cluster.num_devices)
        self._domains = -(-cluster.num_devices // self._domain)
        self._intra_bandwidth = cluster.intra.bandwidth * efficiency.link
        self._mesh = cluster.intra.mesh
        self._intra_latency = cluster.intra.latency_s + efficiency.collective_latency_s
        # one device's share of its node's rails; a ring through n devices of a node drives n shares
        share = cluster.inter.bandwidth * cluster.rails_per_node / cluster.devices_per_node
        self._inter_share = share * efficiency.network
        self._inter_latency = cluster.inter.latency_s + efficiency.collective_latency_s

    def local_ranks(self, group: Group) -> int:
        """How many ranks of a group share one domain."""
        if self._domains == 1 or group.size * group.stride <= self._domain:
            return group.size
        return max(1, min(group.size, self._domain // group.stride))

    def _inside(self, ranks: int) -> float:
        """Bandwidth of each of ``ranks`` devices of a domain to the others: all of its port, or its links to them."""
        return self._intra_bandwidth * ((ranks - 1) / (self._domain - 1) if self._mesh and ranks > 1 else 1.0)

    def _bandwidth_latency(self, group: Group) -> tuple[float, float]:
        local = self.local_ranks(group)
        if local == group.size:
            return self._inside(local), self._intra_latency * math.log2(max(2, local))
        nodes = -(-group.size // local)
        # A ring enters and leaves a domain once for each rail its local ranks own, so its bandwidth is the smaller
        # of the intra link and the rails of those ranks together.
        bandwidth = self._inter_share * local
        if local > 1:
            bandwidth = min(bandwidth, self._inside(local))
        latency = self._inter_latency * math.log2(max(2, nodes))
        if local > 1:
            latency += self._intra_latency * math.log2(local)
        return bandwidth, latency

    def all_gather(self, size: float, group: Group) -> float:
        """Seconds to gather ``size`` bytes in total, each rank holding 1/n of them: (n-1)/n * size / bandwidth."""
        if group.size == 1 or size <= 0:
            return 0.0
        bandwidth, latency = self._bandwidth_latency(group)
        return latency + size * (group.size - 1) / group.size / bandwidth

    def reduce_scatter(self, size: float, group: Group) -> float:
        """Seconds to reduce ``size`` bytes held by every rank and leave 1/n with each; as an all-gather."""
        return self.all_gather(size, group)

    def all_reduce(self, size: float, group: Group) -> float:
        """Seconds to reduce ``size`` bytes held by every rank: a reduce-scatter and an all-gather."""
        return 2 * self.all_gather(size, group)

    def all_to_all(self, size: float, copies: int, group: Group) -> float:
        """Seconds for every rank to send ``size`` bytes of tokens to ``copies`` evenly chosen ranks each.

        Inside a domain every copy moves over the intra link. To another domain a token goes once however many of its
        copies live there (hierarchical dispatch, as in DeepEP and HybridEP): of d domains it visits
        d * (1 - (1 - 1/d) ** copies). Both happen at the same time.
        """
        if group.size == 1 or size <= 0:
            return 0.0
        local = self.local_ranks(group)
        domains = -(-group.size // local)
        inside = size * copies * (local - 1) / local / self._inside(local)
        latency = self._intra_latency
        outside = 0.0
        if domains > 1:
            visited = domains * (1 - (1 - 1 / domains) ** copies)
            outside = size * visited * (domains - 1) / domains / self._inter_share
            latency += self._inter_latency
        return latency + max(inside, outside)

    def send(self, size: float, stride: int) -> float:
        """Seconds to send ``size`` bytes to the rank ``stride`` ranks away, averaged over the stages of a pipeline.

        With k = domain / stride stages in each of d domains, d - 1 of the d * k - 1 sends cross to the next domain.
        """
        if size <= 0:
            return 0.0
        inside = self._intra_latency + size / self._inside(2)
        outside = self._inter_latency + size / self._inter_share
        if stride >= self._domain:
            return outside
        stages = self._domains * self._domain / stride
        crossing = (self._domains - 1) / (stages - 1) if stages > 1 else 0.0
        return inside * (1 - crossing) + outside * crossing

    @property
    def intra_seconds_per_byte(self) -> float:
        """Inverse bandwidth of one device inside its domain."""
        return 1 / self._intra_bandwidth

    @property
    def inter_seconds_per_byte(self) -> float:
        """Inverse bandwidth of one device's share of the network."""
        return 1 / self._inter_share

    @property
    def node(self) -> int:
        """Devices of a node."""
        return self._node

    @property
    def domain(self) -> int:
        """Devices of a domain."""
        return self._domain

    @property
    def latency(self) -> float:
        """Latency of one step inside a domain."""
        return self._intra_latency

    def crosses(self, ranks: int) -> bool:
        """Whether ``ranks`` consecutive ranks span more than one domain."""
        return ranks > self._domain
