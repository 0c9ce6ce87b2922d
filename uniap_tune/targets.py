"""What a target cannot train, by name. A plan nobody can launch is worthless, so this is asked before planning.

Megatron means ``pretrain_gpt.py`` of Megatron-LM with megatron-core 0.16 to 0.19: a feature counts only if an argument
of it (``megatron/training/arguments.py``, ``TransformerConfig``) switches it on. DeepSpeed means the model of
``transformers`` under DeepSpeed 0.19, whose architecture is whatever ``transformers`` implements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from uniap_tune.errors import UnsupportedError
from uniap_tune.spec import DType, Job, Model, Norm, OptimizerName, Position, QkNorm
from uniap_tune.strategy import Target

# (gated, activation) -> the argument that selects it; "" is Megatron's default. Its fused bias + GELU kernel is the
# tanh form (megatron/core/fusions/fused_bias_gelu.py), which differs from the exact one by less than 5e-4.
MEGATRON_ACTIVATIONS: Mapping[tuple[bool, str], str] = MappingProxyType(
    {
        (True, "silu"): "--swiglu",
        (True, "swish"): "--swiglu",
        (False, "gelu"): "",
        (False, "gelu_new"): "",
        (False, "gelu_fast"): "",
        (False, "gelu_pytorch_tanh"): "",
        (False, "relu2"): "--squared-relu",
    }
)

# Bytes of both Adam moments of a parameter -> the dtype of --exp-avg-dtype and --exp-avg-sq-dtype.
MEGATRON_MOMENTS: Mapping[int, str] = MappingProxyType({8: "fp32", 4: "bf16", 2: "fp8"})

# The one factor of Llama 3's scaling that pretrain_gpt.py builds a model with (Llama 3.1's; see the notes below).
LLAMA3_FACTOR = 8.0

# Megatron knows Llama 3's scaling, linear interpolation by whole factors, and YaRN inside latent attention.
_MEGATRON_ROPE_SCALINGS = frozenset({None, "default", "llama3", "linear"})

# What to say, with fields of {model} and {job}, and when.
_Rules = tuple[tuple[str, Callable[[Model, Job], bool]], ...]


def unsupported(model: Model, job: Job, target: Target) -> tuple[str, ...]:
    """What of this model and job the target cannot train, one name each; empty: it can train all of it."""
    return _applying(_RULES[target], model, job)


def notes(model: Model, job: Job, target: Target) -> tuple[str, ...]:
    """What the target does differently from the model without being unable to train it, one sentence each."""
    return _applying(_NOTES[target], model, job)


def _applying(rules: _Rules, model: Model, job: Job) -> tuple[str, ...]:
    return tuple(text.format(model=model, job=job) for text, applies in rules if applies(model, job))


def require_supported(model: Model, job: Job, target: Target) -> None:
    """Refuse what the target cannot train.

    Raises:
        UnsupportedError: names the model, every feature in the way, and the targets without any.
    """
    reasons = unsupported(model, job, target)
    if not reasons:
        return
    able = [other.value for other in Target if not unsupported(model, job, other)]
    fix = f"use --target {' or --target '.join(able)}" if able else "give a model without them"
    raise UnsupportedError(
        f"{model.name}: target {target} cannot train it",
        why=f"{target} lacks: {'; '.join(reasons)}",
        fix=fix,
    )


def _mixed_biases(model: Model, _job: Job) -> bool:
    """Megatron has all biases, none, or those of query, key and value alone."""
    outer = {model.attention_out_bias, model.mlp_bias}
    return len(outer) == 2 or (True in outer and not model.qkv_bias)


def _norm_bias(model: Model, _job: Job) -> bool:
    """Megatron's LayerNorm always has a bias, its RMSNorm never."""
    return model.norm_bias is not (model.norm in (Norm.LAYERNORM, Norm.LAYERNORM_1P))


def _rope_scaling(model: Model, _job: Job) -> bool:
    scaling = model.rope_scaling
    if model.position is not Position.ROPE or (model.mla is not None and scaling == "yarn"):
        return False
    whole = float(model.rope_scaling_factor or 1).is_integer()
    return scaling not in _MEGATRON_ROPE_SCALINGS or (scaling == "linear" and not whole)


def _optimizer_states(_model: Model, job: Job) -> bool:
    if job.optimizer is OptimizerName.SGD:
        return job.state_bytes not in (0, 4)
    return job.state_bytes not in MEGATRON_MOMENTS


# pretrain_gpt.py builds no encoder; a decoder that reads one is no chain of layers, which the search cuts into stages.
_ENCODER_DECODER = ("an encoder before the decoder (T5)", lambda model, _: model.encoder_layers > 0)

_MEGATRON: _Rules = (
    _ENCODER_DECODER,
    ("attention to both sides (BERT)", lambda model, _: not model.causal),
    ("ALiBi positions", lambda model, _: model.position is Position.ALIBI),
    ("soft-capping of attention scores", lambda model, _: model.attention_softcap is not None),
    ("soft-capping of logits", lambda model, _: model.logit_softcap is not None),
    ("norms after attention and MLP", lambda model, _: model.norms_per_layer > 2),
    ("parallel attention and MLP (parallel residual)", lambda model, _: model.parallel_residual),
    (
        "blocks with a single norm",
        lambda model, _: model.norms_per_layer < 2 and not model.parallel_residual,
    ),
    ("blocks without a final norm", lambda model, _: not model.final_norm),
    ("norm after the embedding", lambda model, _: model.embedding_norm),
    ("projection of the embedding to another width", lambda model, _: model.embedding_size is not None),
    ("query-key norm over all heads together", lambda model, _: model.qk_norm is QkNorm.FULL),
    ("bias of the output layer", lambda model, _: model.head_bias),
    ("biases in attention or MLP alone", _mixed_biases),
    ("LayerNorm without a bias or RMSNorm with one", _norm_bias),
    ("rotary scaling of kind {model.rope_scaling} by {model.rope_scaling_factor}", _rope_scaling),
    (
        "rotary base {model.rope_theta}, which is not whole",
        lambda model, _: model.position is Position.ROPE and not float(model.rope_theta).is_integer(),
    ),
    ("chunked attention (Llama 4)", lambda model, _: model.family.startswith("llama4")),
    (
        "gated MLP with {model.activation}",
        lambda model, _: model.gated_mlp and (True, model.activation) not in MEGATRON_ACTIVATIONS,
    ),
    (
        "MLP with {model.activation}",
        lambda model, _: not model.gated_mlp and (False, model.activation) not in MEGATRON_ACTIVATIONS,
    ),
    ("mixed precision without fp32 master weights", lambda _, job: not job.precision.master_weights),
    ("{job.optimizer} with {job.state_bytes} bytes of states a parameter", _optimizer_states),
)

_DEEPSPEED: _Rules = (
    _ENCODER_DECODER,
    ("8-bit or 4-bit training", lambda _, job: job.precision.compute in (DType.FP8, DType.MXFP8, DType.NVFP4)),
    ("mixed precision without fp32 master weights", lambda _, job: not job.precision.master_weights),
)

_RULES: Mapping[Target, _Rules] = MappingProxyType(
    {Target.MEGATRON: _MEGATRON, Target.DEEPSPEED: _DEEPSPEED, Target.ANY: (_ENCODER_DECODER,)}
)

_MEGATRON_NOTES: _Rules = (
    (
        "pretrain_gpt.py builds Llama 3's rotary scaling with a factor of 8 whatever --rope-scaling-factor says "
        "(gpt_builders.py does not pass it on); this model has {model.rope_scaling_factor:g}",
        lambda model, _: model.rope_scaling == "llama3" and model.rope_scaling_factor != LLAMA3_FACTOR,
    ),
    (
        "GELU is computed in its tanh form, which is what the fused kernel does",
        lambda model, _: not model.gated_mlp and model.activation == "gelu" and model.mlp_bias,
    ),
    (
        "how DeepSeek-V3's router scores and groups its experts is left to arguments of your own",
        lambda model, _: model.family == "deepseek_v3",
    ),
)

_DEEPSPEED_NOTES: _Rules = (
    (
        "layers are counted as transformers writes them, operator by operator around fused attention; compiled, or "
        "with fused kernels, they take less time and memory",
        lambda *_: True,
    ),
    (
        "transformers trains this model without its multi-token-prediction layers, which the plan counts",
        lambda model, _: model.mtp_layers > 0,
    ),
)

_NOTES: Mapping[Target, _Rules] = MappingProxyType(
    {Target.MEGATRON: _MEGATRON_NOTES, Target.DEEPSPEED: _DEEPSPEED_NOTES, Target.ANY: ()}
)
