"""Where the time and the memory of a given configuration go: :func:`~uniap_tune.predict.predict`, part by part.

Names of parts are those of :mod:`uniap_tune.cost.parts`, and :data:`SEND` and :data:`BUBBLE` of a pipeline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import ACTIVATIONS, WORKSPACE, LayerCost
from uniap_tune.graph import LayerKind
from uniap_tune.predict import Layers, Prediction, Run, predict
from uniap_tune.schedule import chunks_in_flight, step_seconds

SEND = "send"  # transfers between stages that nothing hides
BUBBLE = "bubble"  # what the slowest stage waits while the pipeline fills and drains


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """A prediction and its parts.

    Attributes:
        prediction: the whole.
        time: seconds of a step by part, on the slowest stage; they sum to the step time.
        memory: for each stage, bytes at its peak by part; they sum to ``prediction.memory_bytes_per_stage``.
        stage_s: for each stage, seconds of one micro-batch, forward and backward.
        blocks: for each stage, its transformer blocks.
        tokens_per_s, mfu: of the whole cluster; model FLOP utilization without recomputation.
        memory_band: half-width of the 80% band of peak memory, as a fraction.
    """

    prediction: Prediction
    time: Mapping[str, float]
    memory: tuple[Mapping[str, float], ...]
    stage_s: tuple[float, ...]
    blocks: tuple[float, ...]
    tokens_per_s: float
    mfu: float
    memory_band: float

    @property
    def bubble(self) -> float:
        """Part of the step that the slowest stage waits for the others."""
        return self.time.get(BUBBLE, 0.0) / self.prediction.step_time_s


def break_down(run: Run) -> Breakdown:
    """Price a run and say where its time and memory go."""
    prediction = predict(run)
    model = CostModel(run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime)
    costs = {layers: _price(model, run, layers) for chunk in run.chunks for layers in chunk}
    stages = [[layers for chunk in run.chunks[i :: run.pp] for layers in chunk] for i in range(run.pp)]
    seconds = [sum(layers.count * costs[layers].time for layers in stage) for stage in stages]
    step = prediction.step_time_s
    job, device = run.job, run.cluster.device
    peak = run.cluster.num_devices * (device.peak_flops.get(job.precision.compute) or max(device.peak_flops.values()))
    return Breakdown(
        prediction=prediction,
        time=_time(run, stages, seconds, costs, step),
        memory=tuple(_memory(run, stage, costs, peak) for stage, peak in enumerate(prediction.memory_bytes_per_stage)),
        stage_s=tuple(seconds),
        blocks=tuple(sum(x.count for x in stage if x.type.kind is LayerKind.BLOCK) for stage in stages),
        tokens_per_s=job.global_batch * job.seq_length / step,
        mfu=model.step_flops() / (step * peak),
        memory_band=prediction.peak_memory_high_bytes / prediction.peak_memory_bytes - 1,
    )


def _price(model: CostModel, run: Run, layers: Layers) -> LayerCost:
    samples = max(1, run.micro_batch // layers.strategy.dp)
    return model.layer_cost(
        layers.type, layers.strategy, samples=samples, pp=run.pp, num_microbatches=run.num_microbatches
    )


def _time(
    run: Run,
    stages: Sequence[Sequence[Layers]],
    seconds: Sequence[float],
    costs: Mapping[Layers, LayerCost],
    step: float,
) -> Mapping[str, float]:
    """Parts of the slowest stage; of what is done once a step, those of the stage that takes longest for it."""
    parts: defaultdict[str, float] = defaultdict(float)
    slowest = stages[seconds.index(max(seconds))]
    for layers in slowest:
        cost = costs[layers]
        for part, value in (*cost.forward_s.items(), *cost.backward_s.items()):
            parts[part] += run.num_microbatches * layers.count * value
    for layers in max(stages, key=lambda stage: sum(x.count * costs[x].step for x in stage)):
        for part, value in costs[layers].step_s.items():
            parts[part] += layers.count * value
    left = step - sum(parts.values())
    if run.pp > 1:
        free = [0.0] * (run.pp - 1)
        alone = step_seconds(seconds, free, run.num_microbatches, run.virtual_stages)
        parts[BUBBLE] = min(left, alone - run.num_microbatches * max(seconds))
        parts[SEND] = left - parts[BUBBLE]
    return MappingProxyType({part: value for part, value in parts.items() if value > 0})


def _memory(run: Run, stage: int, costs: Mapping[Layers, LayerCost], peak: float) -> Mapping[str, float]:
    """Parts of a stage's peak: states, activations in flight, and as the rest what lives shortly.

    At the peak of a stage with few activations the optimizer runs, and no activation is alive.
    """
    own = run.chunks[stage :: run.pp]
    ahead = int(run.runtime.overlap_experts)
    group = run.microbatch_group
    held = chunks_in_flight(stage, run.pp, run.num_microbatches, len(own), run.schedule, group, ahead)
    parts: defaultdict[str, float] = defaultdict(float)
    for chunk, count in zip(own, held, strict=True):
        for layers in chunk:
            cost = costs[layers]
            kept = 1 - min(1.0, run.offloaded_layers / run.model.num_layers)
            alive = count * (kept if layers.type.kind is LayerKind.BLOCK else 1.0)
            for part, value in cost.static_bytes.items():
                parts[part] += layers.count * value
            for part, value in cost.microbatch_bytes.items():
                parts[part] += layers.count * alive * value
    rest = peak - sum(parts.values())
    if rest < 0:
        rest += parts.pop(ACTIVATIONS, 0.0)
    parts[WORKSPACE] = max(0.0, rest)
    return MappingProxyType({part: value for part, value in parts.items() if value > 0})
