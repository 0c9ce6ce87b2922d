"""Megatron-LM arguments (names without dashes) -> what they train and how: shared by measured records and recipes.

Names and defaults follow megatron/training/arguments.py and TransformerConfig of Megatron-LM.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from uniap_tune.cost.runtime import (
    CORE_ATTENTION,
    ENGINE_LOSS,
    FUSED_LOSS,
    MEGATRON_LAUNCH_S,
    MEGATRON_LOSS,
    MEGATRON_SOFTMAX,
    RECOMPUTE_MODULES,
    Runtime,
)
from uniap_tune.errors import InputError
from uniap_tune.megatron.facts import ZERO_OF_SHARDING
from uniap_tune.spec import DType, Job, Mla, Model, Moe, Norm, OptimizerName, Position, Precision, QkNorm, Recompute
from uniap_tune.strategy import Strategy

from .record_fields import Fields, count, flag, number, required, text
from .record_model import family_of

# Vocabulary of the tokenizers Megatron-LM knows, before padding (megatron/training/tokenizer).
_VOCABULARIES = {"gptsentencepiecetokenizer": 256000, "llama2tokenizer": 32000, "bertwordpiececase": 28996}
_GPT2_VOCABULARY = 50257
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}  # bytes of an optimizer state
_MOST_LAYERS = 10_000
_FREQUENCY = re.compile(r"\[([01])\](?:\*(\d{1,5}))?")


def read_model(args: Fields, assumptions: list[str]) -> Model:
    """The model; what had to be assumed about it is added to ``assumptions``.

    Raises:
        InputError: an argument is missing or wrong.
    """
    hidden = required(args, "hidden-size")
    heads = required(args, "num-attention-heads")
    gated = bool(flag(args, "swiglu"))
    bias = not flag(args, "disable-bias-linear")
    position = _position(args)
    rows = count(args, "max-position-embeddings") or required(args, "seq-length")
    norm = _norm(args)
    mla = _latent(args, assumptions)
    kv_heads = count(args, "num-query-groups") if flag(args, "group-query-attention") else None
    learned = position is Position.LEARNED
    window, every = _window(args)
    name = text(args, "name") or f"gpt-h{hidden}"
    return Model(
        name=name,
        family=family_of(name),
        num_layers=_layers(args),
        hidden_size=hidden,
        ffn_size=count(args, "ffn-hidden-size") or (round(8 * hidden / 3 / 64) * 64 if gated else 4 * hidden),
        num_heads=heads,
        num_kv_heads=heads if mla else kv_heads or heads,
        head_dim=_head_dim(args, hidden, heads),
        vocab_size=_vocabulary(args),
        norm=norm,
        norm_bias=norm in (Norm.LAYERNORM, Norm.LAYERNORM_1P),
        qk_norm=_qk_norm(args),
        norm_epsilon=number(args, "norm-epsilon", "layernorm-epsilon") or 1e-5,
        position=position,
        position_rows=rows if learned else 0,
        max_positions=rows if learned else None,
        rope_theta=number(args, "rotary-base") or 10000.0,
        rope_fraction=number(args, "rotary-percent") or 1.0,
        **_rope_scaling(args, mla is not None),
        gated_mlp=gated,
        activation="silu" if gated else "relu2" if flag(args, "squared-relu") else "gelu",
        window=window,
        window_global_every=every,
        qkv_bias=bias or bool(flag(args, "add-qkv-bias")),
        attention_out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=not flag(args, "untie-embeddings-and-output-weights"),
        attention_dropout=_dropout(args, "attention-dropout"),
        hidden_dropout=_dropout(args, "hidden-dropout"),
        moe=_experts(args, hidden),
        mla=mla,
        mtp_layers=count(args, "mtp-num-layers", least=0) or 0,
    )


def _head_dim(args: Fields, hidden: int, heads: int) -> int:
    head_dim = count(args, "kv-channels")
    if head_dim is None and hidden % heads:
        raise InputError(f"hidden-size {hidden} is not a multiple of its {heads} heads", fix="add kv-channels")
    return head_dim or hidden // heads


def _layers(args: Fields) -> int:
    layers = required(args, "num-layers")
    if layers > _MOST_LAYERS:
        raise InputError(f"num-layers is {layers}, which no model has", fix="correct num-layers")
    return layers


def _vocabulary(args: Fields) -> int:
    tokenizer = text(args, "tokenizer-type").lower()
    return count(args, "vocab-size", "padded-vocab-size") or _VOCABULARIES.get(tokenizer, _GPT2_VOCABULARY)


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
        shared_expert_gate=bool(flag(args, "moe-shared-expert-gate")),
        **_expert_layers(args),
    )


def read_dtype(args: Fields) -> DType:
    """The number format of matrix multiplications."""
    if text(args, "fp4-format"):
        return DType.NVFP4
    if text(args, "fp8-format"):
        return DType.MXFP8 if text(args, "fp8-recipe") == "mxfp8" else DType.FP8
    if flag(args, "fp16"):
        return DType.FP16
    return DType.BF16 if flag(args, "bf16") else DType.FP32


def read_gradient_bytes(args: Fields) -> int | None:
    """Bytes of an accumulated gradient; ``None``: the engine's own choice."""
    if flag(args, "grad-reduce-in-bf16"):
        return 2
    return 4 if flag(args, "accumulate-allreduce-grads-in-fp32") else None


def read_flash(args: Fields, assumptions: list[str]) -> bool:
    """Whether attention is fused. The default of TransformerEngine is, of Megatron's local layers it is not."""
    if text(args, "transformer-impl") == "local":
        return bool(flag(args, "use-flash-attn"))
    backend = text(args, "attention-backend")
    if not backend:
        backend = "fused"
        assumptions.append("fused attention, the default")
    return backend not in ("unfused", "local")


def read_strategy(args: Fields, tp: int, cp: int, dp: int) -> Strategy:
    """The parallel strategy of every layer."""
    ep = count(args, "expert-model-parallel-size") or 1
    zero = 1 if flag(args, "use-distributed-optimizer") else 0
    if flag(args, "use-megatron-fsdp"):
        zero = ZERO_OF_SHARDING.get(text(args, "data-parallel-sharding-strategy"), 3)
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


def read_runtime(args: Fields) -> Runtime:
    """How the engine executes.

    Raises:
        InputError: an argument is wrong.
    """
    loss = MEGATRON_LOSS
    if flag(args, "cross-entropy-loss-fusion"):
        loss = ENGINE_LOSS if text(args, "cross-entropy-fusion-impl") == "te" else FUSED_LOSS
    return replace(
        _local_layers(args) if text(args, "transformer-impl") == "local" else Runtime(),
        loss=loss,
        vocab_multiple=count(args, "make-vocab-size-divisible-by") or 128,
        optimizer_instances=count(args, "num-distributed-optimizer-instances") or 1,
        gradient_fusion=not flag(args, "no-gradient-accumulation-fusion"),
        loads_mask=not flag(args, "no-create-attention-mask-in-dataloader"),
        deterministic=bool(flag(args, "deterministic-mode")),
        grouped_experts=bool(flag(args, "moe-grouped-gemm")),
        overlap_experts=bool(flag(args, "overlap-moe-expert-parallel-comm")),
        overlap_tensor=bool(flag(args, "tp-comm-overlap")),
        narrow_parameters=bool(flag(args, "fp8-param-gather")),
        recompute_modules=RECOMPUTE_MODULES & _words(args, "recompute-modules") or frozenset({CORE_ATTENTION}),
        offload_modules=_words(args, "offload-modules"),
        deferred_gradients=_deferred_gradients(args),
    )


def _local_layers(args: Fields) -> Runtime:
    """megatron-core's own layers; their softmax computes 32 bits only where an argument says so."""
    return Runtime(
        fused_kernels=False,
        transformer_engine=False,
        launch_s=MEGATRON_LAUNCH_S,
        softmax_length=0 if flag(args, "no-masked-softmax-fusion") else MEGATRON_SOFTMAX,
        softmax_in_fp32=bool(flag(args, "attention-softmax-in-fp32") or flag(args, "apply-query-key-layer-scaling")),
    )


def _deferred_gradients(args: Fields) -> int | None:
    if not flag(args, "defer-embedding-wgrad-compute"):
        return None
    return count(args, "wgrad-deferral-limit", least=0) or 0


def _words(args: Fields, key: str) -> frozenset[str]:
    """The words of a list, or of a text that writes one."""
    named = args.get(key)
    words = named if isinstance(named, list) else re.findall(r"\w+", text(args, key))
    return frozenset(str(word) for word in words)


def read_job(args: Fields, assumptions: list[str]) -> Job:
    """How the model is trained.

    Raises:
        InputError: an argument is missing or wrong.
    """
    optimizer = text(args, "optimizer") or "adam"
    if optimizer not in ("adam", "sgd"):
        assumptions.append(f"optimizer {optimizer} is priced as adam")
        optimizer = "adam"
    states = None
    if flag(args, "use-precision-aware-optimizer"):
        states = sum(_WIDTHS.get(text(args, name), 4) for name in ("exp-avg-dtype", "exp-avg-sq-dtype"))
    return Job(
        global_batch=required(args, "global-batch-size"),
        seq_length=required(args, "seq-length"),
        precision=Precision(compute=read_dtype(args), gradient_bytes=read_gradient_bytes(args)),
        optimizer=OptimizerName(optimizer),
        optimizer_state_bytes=states,
        flash_attention=read_flash(args, assumptions),
    )


def _position(args: Fields) -> Position:
    if flag(args, "use-rotary-position-embeddings"):
        return Position.ROPE
    kind = text(args, "position-embedding-type") or "learned_absolute"
    return {"learned_absolute": Position.LEARNED, "none": Position.NONE}.get(kind, Position.ROPE)


def _rope_scaling(args: Fields, latent: bool) -> dict[str, Any]:
    if flag(args, "use-rope-scaling"):
        return {"rope_scaling": "llama3", "rope_scaling_factor": number(args, "rope-scaling-factor") or 8.0}
    if count(args, "rotary-seq-len-interpolation-factor"):
        factor = count(args, "rotary-seq-len-interpolation-factor")
        return {"rope_scaling": "linear", "rope_scaling_factor": float(factor or 1)}
    if latent and (text(args, "rope-type") or "yarn") == "yarn":
        return {"rope_scaling": "yarn", "rope_scaling_factor": number(args, "rotary-scaling-factor") or 1.0}
    return {}


def _norm(args: Fields) -> Norm:
    plus_one = bool(flag(args, "apply-layernorm-1p"))
    if text(args, "normalization").lower() == "rmsnorm":
        return Norm.RMSNORM_1P if plus_one else Norm.RMSNORM
    return Norm.LAYERNORM_1P if plus_one else Norm.LAYERNORM


def _qk_norm(args: Fields) -> QkNorm:
    if flag(args, "qk-l2-norm"):
        return QkNorm.L2
    return QkNorm.PER_HEAD if flag(args, "qk-layernorm") else QkNorm.NONE


def _window(args: Fields) -> tuple[int | None, int]:
    """Width of sliding windows, and how often a layer has none."""
    size = re.match(r"\(?\s*(\d{1,9})", text(args, "window-size"))
    skip = text(args, "window-attn-skip-freq")
    return (int(size.group(1)) + 1 if size else None), (int(skip) if skip.isdecimal() else 0)


def _expert_layers(args: Fields) -> dict[str, Any]:
    """Which layers have experts: every N-th, or a list such as ``[0]*3+[1]*58``.

    Raises:
        InputError: a pattern that is neither leading dense layers nor regular.
    """
    value = text(args, "moe-layer-freq").replace(" ", "").strip("()")
    if not value or value == "1":
        return {}
    if value.isdecimal():
        return {"layer_frequency": int(value)}
    layers = required(args, "num-layers")
    pattern = _pattern(value) if layers <= _MOST_LAYERS else ""
    dense = len(pattern) - len(pattern.lstrip("0"))
    if len(pattern) == layers and "0" not in pattern[dense:] and dense < layers:
        return {"first_dense_layers": dense}
    for every in range(2, layers // 2 + 1):
        regular = "".join(str(int(place % every == dense % every)) for place in range(layers))
        if pattern == regular:
            return {"layer_frequency": every, "layer_offset": dense % every}
    raise InputError(
        f"moe-layer-freq {value[:60]!r} cannot be planned",
        why="experts must be in all layers but the first ones, or in every N-th layer",
        fix="correct moe-layer-freq",
    )


def _pattern(value: str) -> str:
    """The zeros and ones of ``([0]*3+[1]*58)`` or ``[0,1,1]``; empty if it is neither."""
    if re.fullmatch(r"\[[01](,[01])*\]", value):
        return value.strip("[]").replace(",", "")
    terms = [_FREQUENCY.fullmatch(term) for term in value.split("+")]
    if not all(terms):
        return ""
    return "".join(term[1] * min(int(term[2] or 1), _MOST_LAYERS) for term in terms if term)
