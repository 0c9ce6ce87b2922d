"""A candidate of the search -> a :class:`~uniap_tune.plan.Plan` with its breakdowns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import BUFFERS, WORKSPACE, LayerCost
from uniap_tune.formulate import Formulation
from uniap_tune.graph import Graph
from uniap_tune.plan import Plan, Stage
from uniap_tune.problem import Evaluation, evaluate, relative_gap
from uniap_tune.replay import chunk_shares
from uniap_tune.search import Candidate
from uniap_tune.simulate import StageTimes, simulate
from uniap_tune.spec import Cluster, Job
from uniap_tune.strategy import Target

RESHARD = "reshard"
RESERVED = "reserved"  # CUDA context, NCCL, fragmentation
OPTIMIZER_STEP = "optimizer_step"  # where the update, not a micro-batch, is the peak


def assemble(
    candidate: Candidate,
    *,
    graph: Graph,
    costs: CostModel,
    cluster: Cluster,
    job: Job,
    target: Target,
    memory_limit_bytes: float,
    bound_s: float,
    status: str,
    inputs: Mapping[str, Any],
    assumptions: tuple[str, ...],
) -> Plan:
    """The plan of a candidate. ``memory_limit_bytes`` is a device's, what is reserved included."""
    formulation, assignment = candidate.formulation, candidate.assignment
    value = evaluate(formulation.problem, assignment)
    stages = tuple(_stage(candidate, graph, costs, job, i, value) for i in range(candidate.pp))
    seconds = simulated_seconds(stages, candidate.num_microbatches, formulation.problem.virtual_stages)
    devices, dtype = cluster.num_devices, job.precision.compute
    peak = cluster.device.peak_flops.get(dtype, max(cluster.device.peak_flops.values()))
    first = stages[0].strategies[0]
    return Plan(
        status=status,
        target=target,
        objective_s=candidate.objective_s,
        bound_s=min(bound_s, candidate.objective_s),
        gap=relative_gap(candidate.objective_s, min(bound_s, candidate.objective_s)),
        step_time_s=seconds,
        tokens_per_s=job.global_batch * job.seq_length / seconds,
        mfu=costs.step_flops() / (seconds * devices * peak),
        memory_limit_bytes=memory_limit_bytes,
        pp=candidate.pp,
        num_microbatches=candidate.num_microbatches,
        micro_batch_size=job.global_batch // (candidate.num_microbatches * first.dp),
        schedule=str(formulation.problem.schedule),
        stages=stages,
        virtual_stages=formulation.problem.virtual_stages,
        inputs=inputs,
        assumptions=assumptions,
    )


def simulated_seconds(stages: tuple[Stage, ...], num_microbatches: int, virtual_stages: int = 1) -> float:
    """Seconds of a step: the schedule event by event, then the slowest stage's once-a-step work."""
    times = [StageTimes(s.forward_s, s.time_s - s.forward_s, s.link_s / 2, s.chunk_shares) for s in stages]
    seconds = simulate(times, num_microbatches, virtual_stages=virtual_stages).seconds
    return seconds + max(s.step_s for s in stages)


def _stage(candidate: Candidate, graph: Graph, costs: CostModel, job: Job, i: int, value: Evaluation) -> Stage:
    formulation, assignment = candidate.formulation, candidate.assignment
    intervals = range(i, formulation.problem.num_intervals, candidate.pp)
    layers = [u for u, interval in enumerate(assignment.stage) if interval in intervals]
    chosen = [formulation.costs[u][assignment.strategy[u]] for u in layers]
    time = _sum([*(cost.forward_s for cost in chosen), *(cost.backward_s for cost in chosen)])
    reshard = value.stage_time_s[i] - sum(cost.time for cost in chosen)
    if reshard > 1e-12 * value.stage_time_s[i]:
        time[RESHARD] = reshard
    return Stage(
        layers=tuple(graph.layers[u].name for u in layers),
        strategies=tuple(formulation.strategies[u][assignment.strategy[u]] for u in layers),
        time_s=value.stage_time_s[i],
        forward_s=sum(cost.forward for cost in chosen) + time.get(RESHARD, 0.0) / 2,
        link_s=value.link_time_s[i] if i < len(value.link_time_s) else 0.0,
        step_s=value.stage_step_s[i],
        time=time,
        step=_sum(cost.step_s for cost in chosen),
        memory=_memory(candidate, costs, job, formulation, layers, chosen),
        chunks=tuple(assignment.stage.count(s) for s in intervals) if len(intervals) > 1 else (),
        chunk_shares=chunk_shares(formulation, assignment, i) if len(intervals) > 1 else (),
    )


def _memory(
    candidate: Candidate,
    costs: CostModel,
    job: Job,
    formulation: Formulation,
    layers: list[int],
    chosen: list[LayerCost],
) -> dict[str, float]:
    """Bytes of the stage's fullest device by part; they sum to its peak."""
    problem = formulation.problem
    held = _sum(cost.static_bytes for cost in chosen)
    flying = _sum(
        {name: problem.in_flight(candidate.assignment.stage[u]) * size for name, size in cost.microbatch_bytes.items()}
        for u, cost in zip(layers, chosen, strict=True)
    )
    largest = max(range(len(layers)), key=lambda place: chosen[place].transient_bytes)
    strategy = formulation.strategies[layers[largest]][candidate.assignment.strategy[layers[largest]]]
    samples = job.global_batch // (candidate.num_microbatches * strategy.dp)
    buffers = costs.buffer_bytes(strategy, samples=samples, virtual_stages=problem.virtual_stages)
    running = sum(flying.values()) + chosen[largest].transient_bytes
    update = sum(cost.step_bytes for cost in chosen)
    if update > running:
        peak = {OPTIMIZER_STEP: update}
    else:
        peak = flying | {BUFFERS: buffers, WORKSPACE: chosen[largest].transient_bytes - buffers}
    return _sum([held, peak, {RESERVED: costs.reserved_bytes()}])


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Named parts added up by name; parts that are zero are left out."""
    total: dict[str, float] = {}
    for mapping in parts:
        for name, value in mapping.items():
            total[name] = total.get(name, 0.0) + value
    return {name: value for name, value in total.items() if value}
