"""Records whose configuration is a table of Megatron-LM arguments (flags without the dashes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from uniap_tune.cost.runtime import Runtime
from uniap_tune.errors import InputError
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.predict import Layers, Run, grouped, uniform_chunks
from uniap_tune.spec import DType, Job, Mla, Model, Moe, Norm, Position, Precision, QkNorm, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

from .record_cluster import read_record_cluster
from .record_fields import Fields, SkippedRecordError, count, flag, mapping, number, required, text
from .record_model import family_of

# Vocabulary of the tokenizers Megatron-LM knows, before padding (megatron/training/tokenizer).
_VOCABULARIES = {"gptsentencepiecetokenizer": 256000, "llama2tokenizer": 32000, "bertwordpiececase": 28996}
_GPT2_VOCABULARY = 50257
_OTHER_MODELS = ("bert", "t5", "multimodal", "hybrid", "mamba", "retro", "vision")
_SHARDING = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}


def read_megatron_run(record: Fields) -> Run:
    """The run of Megatron arguments; its memory is the last stage's, the only one that logs.

    Raises:
        SkippedRecordError: not a decoder-only transformer, or no model.
        InputError: an argument is wrong.
    """
    args = mapping(record, "args") or {}
    kind = text(record, "test").split("/")[0].lower()
    if any(kind.startswith(word) for word in _OTHER_MODELS) or "hybrid-layer-pattern" in args:
        raise SkippedRecordError(f"{kind or 'hybrid'} is not a decoder-only transformer", fix="give GPT records")
    assumptions: list[str] = []
    model, seq = _model(args, assumptions), required(args, "seq-length")
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
    strategy = _strategy(args, tp, cp, dp)
    resumed = text(record, "test_type") not in ("", "regular")
    if resumed:
        assumptions.append(f"{text(record, 'test_type')} run: its peak may be that of loading a checkpoint")
    return Run(
        id=text(record, "id", "test"),
        model=model,
        cluster=read_record_cluster(record, num_gpus),
        job=Job(
            global_batch=batch,
            seq_length=seq,
            precision=Precision(compute=_dtype(args), gradient_bytes=_gradient_bytes(args)),
            flash_attention=_is_flash(args, assumptions),
        ),
        capabilities=CAPABILITIES[Target.MEGATRON],
        runtime=_runtime(args),
        pp=pp,
        chunks=_chunks(args, model, strategy, pp),
        micro_batch=mbs * dp,
        num_microbatches=max(1, batch // (mbs * dp)),
        microbatch_group=count(args, "microbatch-group-size-per-virtual-pipeline-stage"),
        last_stage_only=True,
        exact=not resumed,
        assumptions=tuple(assumptions),
    )


def _model(args: Fields, assumptions: list[str]) -> Model:
    hidden = required(args, "hidden-size")
    heads = required(args, "num-attention-heads")
    gated = bool(flag(args, "swiglu"))
    bias = not flag(args, "disable-bias-linear")
    position = text(args, "position-embedding-type") or "learned_absolute"
    rows = count(args, "max-position-embeddings") or required(args, "seq-length")
    norm = Norm.RMSNORM if text(args, "normalization").lower() == "rmsnorm" else Norm.LAYERNORM
    head_dim = count(args, "kv-channels")
    if head_dim is None:
        if hidden % heads:
            raise InputError(f"hidden-size {hidden} is not a multiple of its {heads} heads", fix="add kv-channels")
        head_dim = hidden // heads
    mla = _latent(args, assumptions)
    kv_heads = count(args, "num-query-groups") if flag(args, "group-query-attention") else None
    learned = position == "learned_absolute"
    name = text(args, "name") or f"gpt-h{hidden}"
    return Model(
        name=name,
        family=family_of(name),
        num_layers=_layers(args),
        hidden_size=hidden,
        ffn_size=count(args, "ffn-hidden-size") or (round(8 * hidden / 3 / 64) * 64 if gated else 4 * hidden),
        num_heads=heads,
        num_kv_heads=heads if mla else kv_heads or heads,
        head_dim=head_dim,
        vocab_size=_vocabulary(args),
        norm=norm,
        norm_bias=norm is Norm.LAYERNORM,
        qk_norm=QkNorm.PER_HEAD if flag(args, "qk-layernorm") else QkNorm.NONE,
        position=Position.LEARNED if learned else Position.ROPE,
        position_rows=rows if learned else 0,
        gated_mlp=gated,
        activation="silu" if gated else "gelu",
        qkv_bias=bias or bool(flag(args, "add-qkv-bias")),
        attention_out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=not flag(args, "untie-embeddings-and-output-weights"),
        attention_dropout=_dropout(args, "attention-dropout"),
        hidden_dropout=_dropout(args, "hidden-dropout"),
        moe=_experts(args, hidden),
        mla=mla,
    )


def _layers(args: Fields) -> int:
    layers = required(args, "num-layers")
    if layers > 10_000:
        raise InputError(f"num-layers is {layers}, which no model has", fix="correct num-layers")
    return layers


def _vocabulary(args: Fields) -> int:
    tokenizer = text(args, "tokenizer-type").lower()
    return count(args, "vocab-size") or _VOCABULARIES.get(tokenizer, _GPT2_VOCABULARY)


def _dropout(args: Fields, key: str) -> float:
    """Megatron's default is 0.1."""
    return 0.1 if args.get(key) is None else number(args, key) or 0.0


def _latent(args: Fields, assumptions: list[str]) -> Mla | None:
    if not flag(args, "multi-latent-attention"):
        return None
    if count(args, "qk-head-dim") is None:
        assumptions.append("latent attention with Megatron's default head sizes (128 + 64, values 128)")
    return Mla(
        q_lora_rank=count(args, "q-lora-rank"),
        kv_lora_rank=count(args, "kv-lora-rank") or 32,
        qk_nope_dim=count(args, "qk-head-dim") or 128,
        qk_rope_dim=count(args, "qk-pos-emb-head-dim") or 64,
        v_dim=count(args, "v-head-dim") or 128,
    )


def _experts(args: Fields, hidden: int) -> Moe | None:
    experts = count(args, "num-experts")
    if experts is None:
        return None
    return Moe(
        num_experts=experts,
        top_k=count(args, "moe-router-topk") or 2,
        expert_ffn_size=count(args, "moe-ffn-hidden-size", "ffn-hidden-size") or 4 * hidden,
        shared_ffn_size=count(args, "moe-shared-expert-intermediate-size", least=0) or 0,
    )


def _dtype(args: Fields) -> DType:
    if flag(args, "fp16"):
        return DType.FP16
    return DType.BF16 if flag(args, "bf16") else DType.FP32


def _gradient_bytes(args: Fields) -> int | None:
    return 4 if flag(args, "accumulate-allreduce-grads-in-fp32") else None


def _is_flash(args: Fields, assumptions: list[str]) -> bool:
    """Whether attention is fused. The default of TransformerEngine is, of Megatron's local layers it is not."""
    if text(args, "transformer-impl") == "local":
        return bool(flag(args, "use-flash-attn"))
    backend = text(args, "attention-backend")
    if not backend:
        backend = "fused"
        assumptions.append("fused attention, the default")
    return backend not in ("unfused", "local")


def _strategy(args: Fields, tp: int, cp: int, dp: int) -> Strategy:
    ep = count(args, "expert-model-parallel-size") or 1
    zero = 1 if flag(args, "use-distributed-optimizer") else 0
    if flag(args, "use-megatron-fsdp"):
        zero = _SHARDING.get(text(args, "data-parallel-sharding-strategy"), 3)
    granularity = text(args, "recompute-granularity")
    recompute = {"full": Recompute.FULL, "selective": Recompute.SELECTIVE}.get(granularity, Recompute.NONE)
    return Strategy(
        tp=tp,
        cp=cp,
        dp=dp,
        ep=ep,
        etp=count(args, "expert-tensor-parallel-size") or tp,
        zero=zero,
        recompute=recompute,
        sequence_parallel=tp > 1 and bool(flag(args, "sequence-parallel")),
    )


def _runtime(args: Fields) -> Runtime:
    """Losses by bytes a logit: Megatron's own 6, fused natively 10, TransformerEngine's 4."""
    loss = 6.0
    if flag(args, "cross-entropy-loss-fusion"):
        loss = 4.0 if text(args, "cross-entropy-fusion-impl") == "te" else 10.0
    return Runtime(
        loss_bytes=loss,
        vocab_multiple=count(args, "make-vocab-size-divisible-by") or 128,
        optimizer_instances=count(args, "num-distributed-optimizer-instances") or 1,
        fused_kernels=text(args, "transformer-impl") != "local",
        transformer_engine=text(args, "transformer-impl") != "local",
        gradient_fusion=not flag(args, "no-gradient-accumulation-fusion"),
        deterministic=bool(flag(args, "deterministic-mode")),
    )


def _chunks(args: Fields, model: Model, strategy: Strategy, pp: int) -> tuple[tuple[Layers, ...], ...]:
    types = [layer.type for layer in build_graph(model).layers]
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
    if fixed >= len(blocks) or others < 1 or (len(blocks) - fixed) % others:
        raise InputError("first and last stages leave layers that do not divide evenly", fix="correct their layers")
    even = (len(blocks) - fixed) // others
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
