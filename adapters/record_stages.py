"""Records that give every pipeline stage its own layers and degrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType, block_type
from uniap_tune.predict import Layers
from uniap_tune.spec import Model, Recompute
from uniap_tune.strategy import Strategy

from .record_fields import Fields, SkippedRecordError, counts, mapping, required

# Positions in a stage's strategy: micro-batch size, dp, tp, then whether weights, gradients and optimizer states are
# sharded over dp, then offloaded fractions.
_STRATEGY_LENGTH = 10
# Operators an Aceso block is cut into: its 13-operator GPT layer (layer norms, projections, attention, dropouts).
_OPERATORS_PER_BLOCK = 13
# Those of the attention core (scores, softmax, dropout, context), which hold most of a block's memory; that they are
# the first to be recomputed is [Empirical], from the measured stages.
_CORE_OPERATORS = 4


@dataclass(frozen=True, slots=True)
class Staged:
    """Chunks of a run whose stages differ, and its micro-batch over all replicas."""

    pp: int
    chunks: tuple[tuple[Layers, ...], ...]
    micro_batch: int
    assumption: str = ""


def is_staged(record: Fields) -> bool:
    """Whether the record lists its stages."""
    return record.get("strategy") is not None or record.get("ops_per_stage") is not None


def staged_chunks(record: Fields, model: Model) -> Staged | None:
    """The stages of a record that lists them, else ``None``.

    Raises:
        InputError: lists that do not belong together.
    """
    plan = mapping(record, "strategy")
    if plan is not None:
        return _partitioned(plan, model)
    if record.get("ops_per_stage") is not None:
        return _by_operators(record, model)
    return None


def _partitioned(plan: Fields, model: Model) -> Staged:
    """``layer_partitions``, ``gradient_checkpointing`` (checkpointed layers of each stage), ``stage_strategies``."""
    layers = counts(plan, "layer_partitions") or []
    recomputed = counts(plan, "gradient_checkpointing") or [0] * len(layers)
    rows = plan.get("stage_strategies")
    if not isinstance(rows, list) or not len(rows) == len(layers) == len(recomputed):
        raise InputError("record's strategy lists differ in length", fix="give one entry a stage in each")
    strategies = [_strategy(row) for row in rows]
    if sum(layers) != model.num_layers:
        raise InputError(f"record's stages have {sum(layers)} of {model.num_layers} layers", fix="correct the lists")
    chunks, first = [], 0
    for stage, (size, full) in enumerate(zip(layers, recomputed, strict=True)):
        counts_of = {Recompute.FULL: min(full, size), Recompute.NONE: max(0, size - full)}
        chunks.append(_stage(model, strategies[stage][0], counts_of, first, stage, len(layers)))
        first += size
    return Staged(len(layers), tuple(chunks), strategies[0][1] * strategies[0][0].dp)


def _strategy(row: object) -> tuple[Strategy, int]:
    numbers = counts({"stage_strategies": row[:6]}, "stage_strategies") if isinstance(row, list) else None
    if numbers is None or not isinstance(row, list) or len(row) != _STRATEGY_LENGTH:
        raise InputError("record's stage_strategies must be lists of ten numbers", fix="correct stage_strategies")
    if any(isinstance(part, int | float) and part > 0 for part in row[7:]) or (
        isinstance(row[6], int | float) and row[6] > 0
    ):
        raise SkippedRecordError(
            "record offloads to the host, which is not modelled", fix="give records without offload"
        )
    micro_batch, dp, tp = (max(1, value) for value in numbers[:3])
    zero = 3 if numbers[3] else 2 if numbers[4] else 1 if numbers[5] else 0
    return Strategy(tp=tp, dp=dp, zero=zero), micro_batch


def _by_operators(record: Fields, model: Model) -> Staged:
    """Stages as numbers of operators: blocks in proportion; recomputed ones fill the attention cores of blocks, then
    whole blocks."""
    operators = counts(record, "ops_per_stage", least=1) or []
    recomputed = counts(record, "recompute_ops_per_stage") or [0] * len(operators)
    tp = counts(record, "tp_per_stage", least=1) or [1] * len(operators)
    dp = counts(record, "dp_per_stage", least=1) or [1] * len(operators)
    if not len(operators) == len(recomputed) == len(tp) == len(dp):
        raise InputError("record's lists of stages differ in length", fix="give one entry a stage in each")
    mbs = required(record, "mbs")
    chunks = []
    first = 0.0
    for stage, (size, full) in enumerate(zip(operators, recomputed, strict=True)):
        blocks = model.num_layers * size / sum(operators)
        whole = min(blocks, max(0.0, full - _CORE_OPERATORS * blocks) / (_OPERATORS_PER_BLOCK - _CORE_OPERATORS))
        cores = min(blocks, full / _CORE_OPERATORS) - whole
        counts_of = {Recompute.FULL: whole, Recompute.SELECTIVE: cores, Recompute.NONE: blocks - whole - cores}
        strategy = Strategy(tp=tp[stage], dp=dp[stage])
        chunks.append(_stage(model, strategy, counts_of, int(first), stage, len(operators)))
        first += blocks
    return Staged(len(operators), tuple(chunks), mbs * max(dp), "recomputed operators taken for attention cores")


def _stage(
    model: Model, strategy: Strategy, blocks: Mapping[Recompute, float], first: int, stage: int, stages: int
) -> tuple[Layers, ...]:
    """The layers of a stage: ``blocks`` of each recomputation."""
    block = block_type(model, min(first, model.num_layers - 1))
    parts = []
    if stage == 0:
        parts.append(Layers(type=LayerType(kind=LayerKind.EMBEDDING), strategy=strategy))
    for recompute, count in blocks.items():
        if count > 0:
            parts.append(Layers(type=block, strategy=replace(strategy, recompute=recompute), count=count))
    if stage == stages - 1:
        parts.append(Layers(type=LayerType(kind=LayerKind.HEAD), strategy=strategy))
    return tuple(parts)
