"""Time and memory of one given configuration: the cost model without the search.

A :class:`Run` is a complete description of a training job; :func:`predict` prices each stage's layers with
:class:`~uniap_tune.cost.model.CostModel`, the code that prices the search, and puts them together by the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from uniap_tune.cost.efficiency import Efficiency
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import LayerCost
from uniap_tune.cost.runtime import Runtime
from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.schedule import Schedule, chunks_in_flight, step_seconds
from uniap_tune.spec import Cluster, Job, Model
from uniap_tune.strategy import Capabilities, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """``count`` equal layers; a fraction where a source only says how many operators a stage has."""

    type: LayerType
    strategy: Strategy
    count: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run: what, where, how, and how it is cut.

    ``chunks`` are the model's parts in order; chunk k is on stage k % pp (as virtual stages are numbered in
    Megatron-LM). ``micro_batch`` is in samples, over all replicas. ``microbatch_group``: micro-batches a
    chunk runs in a row when stages are virtual, by default pp. ``offloaded_layers``: blocks whose
    activations wait in host memory. ``last_stage_only``: its memory was logged by the
    last stage alone. ``exact`` is False if a field that matters was missing and had to be assumed.
    """

    id: str
    model: Model
    cluster: Cluster
    job: Job
    capabilities: Capabilities
    runtime: Runtime
    pp: int
    chunks: tuple[tuple[Layers, ...], ...]
    micro_batch: int
    num_microbatches: int
    schedule: Schedule = Schedule.ONE_F_ONE_B
    microbatch_group: int | None = None
    offloaded_layers: int = 0
    last_stage_only: bool = False
    exact: bool = True
    assumptions: tuple[str, ...] = ()

    @property
    def virtual_stages(self) -> int:
        """Model chunks of a stage."""
        return len(self.chunks) // self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run takes. Memory is what the framework has allocated; ``overhead_bytes`` comes on top of it.

    ``step_time_low_s`` and ``step_time_high_s`` bound the 80% band, so do the two of memory.
    """

    step_time_s: float
    step_time_low_s: float
    step_time_high_s: float
    steady_memory_bytes: float
    peak_memory_bytes: float
    peak_memory_low_bytes: float
    peak_memory_high_bytes: float
    overhead_bytes: float
    memory_bytes_per_stage: tuple[float, ...]
    fits: bool
    assumptions: tuple[str, ...]


# How much wider the bands are when a field that matters had to be assumed [Empirical].
_ASSUMED = 1.5


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Memory of one stage: held for the whole step, and at its fullest."""

    steady: float
    peak: float


@dataclass(frozen=True, slots=True)
class _Priced:
    layers: Layers
    cost: LayerCost


def predict(run: Run, *, efficiency: Efficiency | None = None) -> Prediction:
    """Prices a run, with the constants of its GPU's generation unless others are given."""
    cost_model = CostModel(
        run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime, efficiency=efficiency
    )
    chunks = [[_Priced(layers, _price(cost_model, run, layers)) for layers in chunk] for chunk in run.chunks]
    seconds = _step_seconds(cost_model, run, chunks)
    stages = [stage_bytes(cost_model, run, chunks, stage) for stage in range(run.pp)]
    reported = stages[-1:] if run.last_stage_only else stages
    peak = max(stage.peak for stage in reported)
    overhead = cost_model.reserved_bytes()
    band, memory_band = cost_model.time_band(), cost_model.memory_band()
    if not run.exact:
        band, memory_band = _ASSUMED * band, _ASSUMED * memory_band
    return Prediction(
        step_time_s=seconds,
        step_time_low_s=seconds / (1 + band),
        step_time_high_s=seconds * (1 + band),
        steady_memory_bytes=max(stage.steady for stage in reported),
        peak_memory_bytes=peak,
        peak_memory_low_bytes=peak / (1 + memory_band),
        peak_memory_high_bytes=peak * (1 + memory_band),
        overhead_bytes=overhead,
        memory_bytes_per_stage=tuple(stage.peak for stage in stages),
        fits=max(stage.peak for stage in stages) + overhead <= run.cluster.device.memory_bytes,
        assumptions=run.assumptions,
    )


def _price(cost_model: CostModel, run: Run, layers: Layers) -> LayerCost:
    samples = max(1, run.micro_batch // layers.strategy.dp)
    return cost_model.layer_cost(
        layers.type, layers.strategy, samples=samples, pp=run.pp, num_microbatches=run.num_microbatches
    )


def _step_seconds(cost_model: CostModel, run: Run, chunks: Sequence[Sequence[_Priced]]) -> float:
    """Pipeline time and what is exposed once a step on the slowest stage."""
    stages = [0.0] * run.pp
    once = [0.0] * run.pp
    for index, chunk in enumerate(chunks):
        for priced in chunk:
            stages[index % run.pp] += priced.layers.count * priced.cost.time
            once[index % run.pp] += priced.layers.count * priced.cost.step
    layouts = [chunk[0].layers.strategy.layout for chunk in chunks[: run.pp]]
    links = [
        cost_model.send_seconds(source, target, microbatch=run.micro_batch, pp=run.pp)
        for source, target in pairwise(layouts)
    ]
    return step_seconds(stages, links, run.num_microbatches, run.virtual_stages) + max(once)


def stage_bytes(cost_model: CostModel, run: Run, chunks: Sequence[Sequence[_Priced]], stage: int) -> StageBytes:
    """Allocated bytes of one stage, as the framework's allocator counts them.

    Peak: states and buffers, the activations of every micro-batch in flight, and the largest need of one layer
    while it runs; or the optimizer's own need, when it is larger.
    """
    own = [chunk for index, chunk in enumerate(chunks) if index % run.pp == stage]
    ahead = int(run.runtime.overlap_experts)
    group = run.microbatch_group
    held = chunks_in_flight(stage, run.pp, run.num_microbatches, len(own), run.schedule, group, ahead)
    static = sum(p.layers.count * p.cost.static for chunk in own for p in chunk)
    static += cost_model.uncut_states(
        [(p.layers.type, p.layers.strategy, round(p.layers.count)) for chunk in own for p in chunk], pp=run.pp
    )
    step = sum(p.layers.count * p.cost.step_bytes for chunk in own for p in chunk)
    kept = 1 - min(1.0, run.offloaded_layers / run.model.num_layers)
    flight = sum(
        count * _held_bytes(cost_model, run, p) * (kept if p.layers.type.kind is LayerKind.BLOCK else 1.0)
        for chunk, count in zip(own, held, strict=True)
        for p in chunk
    )
    transient = max((p.cost.transient_bytes for chunk in own for p in chunk), default=0.0)
    strategy = own[0][0].layers.strategy
    samples = max(1, run.micro_batch // strategy.dp)
    buffers = cost_model.buffer_bytes(strategy, samples=samples, virtual_stages=len(own))
    steady = static + step + buffers + cost_model.pipeline_bytes(strategy, samples=samples, pp=run.pp)
    return StageBytes(steady, max(static + buffers + flight + transient, steady))


def _held_bytes(cost_model: CostModel, run: Run, priced: _Priced) -> float:
    """Bytes that equal layers hold for one micro-batch in flight."""
    layers = priced.layers
    samples = max(1, run.micro_batch // layers.strategy.dp)
    uncut = cost_model.uncut_activations(layers.type, layers.strategy, samples=samples, times=round(layers.count))
    return layers.count * priced.cost.microbatch + uncut


def uniform_chunks(
    types: Sequence[LayerType], strategy: Strategy, pp: int, virtual_stages: int
) -> tuple[tuple[Layers, ...], ...]:
    """Blocks divided evenly over pp * v chunks, embedding in the first and head in the last.

    Where only the blocks with embedding and head divide evenly, those two count as a layer each (Megatron's
    ``--account-for-embedding-in-pipeline-split`` and ``--account-for-loss-in-pipeline-split``).

    Raises:
        InputError: more chunks than layers.
    """
    parts = pp * virtual_stages
    blocks = [layer for layer in types if layer.kind is LayerKind.BLOCK]
    if len(blocks) % parts and len(types) % parts == 0:
        size = len(types) // parts
        return tuple(grouped(types[i * size : (i + 1) * size], strategy) for i in range(parts))
    if parts > len(blocks):
        raise InputError(
            f"{pp} stages of {virtual_stages} virtual stages are too many for {len(blocks)} layers",
            fix="use fewer stages or virtual stages",
        )
    sizes = [len(blocks) // parts + (1 if i < len(blocks) % parts else 0) for i in range(parts)]
    cuts = [sum(sizes[:i]) for i in range(parts + 1)]
    parted: list[list[LayerType]] = [list(blocks[cuts[i] : cuts[i + 1]]) for i in range(parts)]
    parted[0].insert(0, LayerType(kind=LayerKind.EMBEDDING))
    parted[-1].append(LayerType(kind=LayerKind.HEAD))
    return tuple(grouped(part, strategy) for part in parted)


def grouped(types: Sequence[LayerType], strategy: Strategy) -> tuple[Layers, ...]:
    """Neighbouring equal layers as one entry with their count."""
    groups: list[Layers] = []
    for layer in types:
        if groups and groups[-1].type == layer:
            groups[-1] = Layers(type=layer, strategy=strategy, count=groups[-1].count + 1)
        else:
            groups.append(Layers(type=layer, strategy=strategy))
    return tuple(groups)
