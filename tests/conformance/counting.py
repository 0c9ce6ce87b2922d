"""Costs of a cluster on which seconds are bytes over a rank's link, to compare with what a real engine sends."""

from __future__ import annotations

from dataclasses import replace

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.cost.efficiency import efficiency_for
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import DP_COMM, TP_COMM, ZERO_COMM
from uniap_tune.graph import LayerType
from uniap_tune.spec import Job, Link, Model
from uniap_tune.strategy import CAPABILITIES, Strategy, Target


def counting_costs(model: Model, job: Job, target: Target, devices: int) -> CostModel:
    """Links of one byte a second, without latency, behind which nothing hides; memory takes no time."""
    usual = read_cluster(f"1x{devices}:a100-80gb")
    device = replace(usual.device, memory_bandwidth=1e30)
    cluster = replace(usual, intra=Link(bandwidth=1.0, latency_s=0.0), device=device)
    efficiency = replace(efficiency_for(device), link=1.0, dp_overlap=0.0, dp_exposed=0.0, collective_latency_s=0.0)
    return CostModel(model, cluster, job, CAPABILITIES[target], efficiency=efficiency)


def link_bytes(costs: CostModel, layer: LayerType, strategy: Strategy, microbatches: int, *, pp: int = 1) -> float:
    """What tensor and data parallelism of a layer send in a step."""
    cost = costs.layer_cost(layer, strategy, samples=1, pp=pp, num_microbatches=microbatches)
    each = sum(way.get(part, 0.0) for way in (cost.forward_s, cost.backward_s) for part in (TP_COMM, ZERO_COMM))
    return microbatches * each + cost.step_s.get(DP_COMM, 0.0)
