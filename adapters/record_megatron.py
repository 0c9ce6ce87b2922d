"""Records whose configuration is a table of Megatron-LM arguments (flags without the dashes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.predict import Layers, Run, grouped, uniform_chunks
from uniap_tune.spec import Job, Model, Precision, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

from .megatron_arguments import (
    read_dtype,
    read_flash,
    read_gradient_bytes,
    read_model,
    read_runtime,
    read_strategy,
)
from .megatron_kinds import bert_arguments, bert_model, t5_arguments, t5_model
from .record_cluster import read_record_cluster
from .record_fields import Fields, SkippedRecordError, count, flag, mapping, required, text
from .record_layout import laid_out

_OTHER_MODELS = ("multimodal", "hybrid", "mamba", "retro", "vision", "mimo")


def read_megatron_run(record: Fields) -> Run:
    """The run of Megatron arguments; its memory is the last stage's, the only one that logs.

    Raises:
        SkippedRecordError: not GPT, BERT or T5, or no model.
        InputError: an argument is wrong.
    """
    args = mapping(record, "args") or {}
    kind = text(record, "test").split("/")[0].lower()
    _require_training_of_a_transformer(kind, args)
    assumptions: list[str] = []
    args, model, encoder_seq = _model(kind, args, assumptions)
    tp, pp, cp = (count(args, f"{name}-parallel-size") or 1 for name in ("tensor-model", "pipeline-model", "context"))
    num_gpus = count(record, "num_gpus") or count(args, "world-size")
    if num_gpus is None:
        num_gpus = max(8, tp * pp * cp)
        assumptions.append(f"{num_gpus} GPUs")
    dp = num_gpus // (tp * pp * cp)
    if dp * tp * pp * cp != num_gpus:
        raise InputError(f"tp({tp}) * pp({pp}) * cp({cp}) does not divide {num_gpus} GPUs", fix="correct the degrees")
    mbs = required(args, "micro-batch-size")
    batch = count(args, "global-batch-size") or mbs * dp
    strategy = read_strategy(args, tp, cp, dp)
    resumed = text(record, "test_type") not in ("", "regular")
    if resumed:
        assumptions.append(f"{text(record, 'test_type')} run: its peak may be that of loading a checkpoint")
    return Run(
        id=text(record, "id", "test"),
        model=model,
        cluster=read_record_cluster(record, num_gpus),
        job=Job(
            global_batch=batch,
            seq_length=required(args, "seq-length"),
            encoder_seq_length=encoder_seq,
            precision=Precision(compute=read_dtype(args), gradient_bytes=read_gradient_bytes(args)),
            flash_attention=read_flash(args, assumptions),
        ),
        capabilities=CAPABILITIES[Target.MEGATRON],
        runtime=read_runtime(args),
        pp=pp,
        chunks=_chunks(args, model, strategy, pp),
        micro_batch=mbs * dp,
        num_microbatches=max(1, batch // (mbs * dp)),
        microbatch_group=count(args, "microbatch-group-size-per-virtual-pipeline-stage"),
        last_stage_only=True,
        exact=not resumed and _states_attention(args) and encoder_seq is None,
        assumptions=tuple(assumptions),
    )


def _require_training_of_a_transformer(kind: str, args: Fields) -> None:
    if any(kind.startswith(word) for word in _OTHER_MODELS) or "hybrid-layer-pattern" in args:
        raise SkippedRecordError(
            f"{kind or 'hybrid'} is not a transformer alone", fix="give records of GPT, BERT or T5"
        )
    if flag(args, "perform-rl-step"):
        raise SkippedRecordError(
            "reinforcement learning holds a model for inference too", fix="give records of training"
        )


def _model(kind: str, args: Fields, assumptions: list[str]) -> tuple[Fields, Model, int | None]:
    """The arguments with what a kind of model assumes, the model, and its encoder's sequence length."""
    if kind.startswith("bert"):
        args = bert_arguments(args, assumptions)
        return args, bert_model(read_model(args, assumptions), args), None
    if kind.startswith("t5"):
        args, layers, seq = t5_arguments(args, assumptions)
        return args, t5_model(read_model(args, assumptions), args, layers), seq
    return args, read_model(args, assumptions), None


def _states_attention(args: Fields) -> bool:
    """Whether the kernels of attention are known: up to 42% of the peak hangs on them."""
    return bool(text(args, "attention-backend")) or text(args, "transformer-impl") == "local"


def _chunks(args: Fields, model: Model, strategy: Strategy, pp: int) -> tuple[tuple[Layers, ...], ...]:
    types = [layer.type for layer in build_graph(model).layers]
    if text(args, "pipeline-model-parallel-layout"):
        layout = text(args, "pipeline-model-parallel-layout")
        return _block_recompute(args, laid_out(layout, model, strategy, pp, None))
    first = count(args, "decoder-first-pipeline-num-layers")
    last = count(args, "decoder-last-pipeline-num-layers")
    virtual = count(args, "num-virtual-stages-per-pipeline-rank") or 1
    per_chunk = count(args, "num-layers-per-virtual-pipeline-stage")
    if pp > 1 and per_chunk:
        virtual = max(1, model.num_layers // (pp * per_chunk))
    if pp > 1 and (first or last):
        return _uneven(types, strategy, pp, first, last)
    chunks = uniform_chunks(types, strategy, pp, virtual if pp > 1 else 1)
    return _block_recompute(args, chunks)


def _uneven(
    types: Sequence[LayerType], strategy: Strategy, pp: int, first: int | None, last: int | None
) -> tuple[tuple[Layers, ...], ...]:
    blocks = list(types[1:-1])
    fixed = (first or 0) + (last or 0)
    others = pp - bool(first) - bool(last)
    left = len(blocks) - fixed
    if left < others or others < 0 or (left % others if others else left):
        raise InputError("first and last stages leave layers that do not divide evenly", fix="correct their layers")
    even = left // others if others else 0
    sizes = [first or even, *[even] * (pp - 2), last or even]
    cuts = [sum(sizes[:i]) for i in range(pp + 1)]
    parts = [blocks[cuts[i] : cuts[i + 1]] for i in range(pp)]
    parts[0].insert(0, types[0])
    parts[-1].append(types[-1])
    return tuple(grouped(part, strategy) for part in parts)


def _block_recompute(args: Fields, chunks: tuple[tuple[Layers, ...], ...]) -> tuple[tuple[Layers, ...], ...]:
    if text(args, "recompute-method") != "block":
        return chunks
    leading = count(args, "recompute-num-layers") or 1
    return tuple(leading_recompute(chunk, leading) for chunk in chunks)


def full_recompute(chunks: tuple[tuple[Layers, ...], ...]) -> tuple[tuple[Layers, ...], ...]:
    """The same layers, all recomputed in full."""
    return tuple(
        tuple(replace(part, strategy=replace(part.strategy, recompute=Recompute.FULL)) for part in chunk)
        for chunk in chunks
    )


def leading_recompute(chunk: tuple[Layers, ...], leading: int) -> tuple[Layers, ...]:
    """Recomputes only the first ``leading`` blocks of a chunk (Megatron's ``--recompute-method block``)."""
    result: list[Layers] = []
    left = float(leading)
    for layers in chunk:
        if layers.strategy.recompute is Recompute.NONE or layers.type.kind is not LayerKind.BLOCK:
            result.append(layers)
            continue
        taken = min(left, layers.count)
        left -= taken
        if taken:
            result.append(replace(layers, count=taken))
        if layers.count > taken:
            plain = replace(layers.strategy, recompute=Recompute.NONE)
            result.append(Layers(type=layers.type, strategy=plain, count=layers.count - taken))
    return tuple(result)
