"""Keys of NeMo and Megatron-Bridge configurations as Megatron-LM arguments, and back.

Names are those of megatron-core's ``TransformerConfig`` wherever both use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from uniap_tune.megatron.mcore import DDP_SWITCHES, MODEL_FIELDS, MODEL_SWITCHES

# Names of NeMo's model section that are not megatron-core's.
_OWN = {
    "encoder_seq_length": "seq-length",
    "seq_length": "seq-length",
    "max_position_embeddings": "max-position-embeddings",
    "micro_batch_size": "micro-batch-size",
    "global_batch_size": "global-batch-size",
    "make_vocab_size_divisible_by": "make-vocab-size-divisible-by",
    "vocab_size": "vocab-size",
    "rotary_base": "rotary-base",
    "rotary_percentage": "rotary-percent",
    "rotary_percent": "rotary-percent",
    "seq_len_interpolation_factor": "rotary-seq-len-interpolation-factor",
    "position_embedding_type": "position-embedding-type",
    "layernorm_epsilon": "norm-epsilon",
    "activations_checkpoint_granularity": "recompute-granularity",
    "activations_checkpoint_method": "recompute-method",
    "activations_checkpoint_num_layers": "recompute-num-layers",
}
KEYS: Mapping[str, str] = MappingProxyType({field: name for name, field in MODEL_FIELDS.items()} | _OWN)

# Megatron-LM sets both itself where stages are virtual (megatron/training/arguments.py, overlap_p2p_comm). With batched
# sends two stages that send to each other both ways take one message for the other.
_UNBATCHED = {"overlap_p2p_comm": ("overlap-p2p-comm", True), "batch_p2p_comm": ("no-batch-p2p-comm", False)}
FOR_VIRTUAL_STAGES = frozenset(name for name, _ in _UNBATCHED.values())

SWITCHES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {field: (name, value) for name, (field, value) in MODEL_SWITCHES.items()}
    | {
        "bias": ("disable-bias-linear", False),
        "share_embeddings_and_output_weights": ("untie-embeddings-and-output-weights", False),
        "qkv_bias": ("add-qkv-bias", True),
        "ub_tp_comm_overlap": ("tp-comm-overlap", True),
        "deterministic_mode": ("deterministic-mode", True),
    }
    | _UNBATCHED
)

_NORMS = {
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
    "rmsnorm": ("RMSNorm", False),
}
_ACTIVATIONS = {"swiglu": "swiglu", "fast-swiglu": "swiglu", "silu": "swiglu", "squared-relu": "squared-relu"}


def as_arguments(key: str, value: str) -> dict[str, str | bool]:
    """The arguments that a key of the model section with this value stands for; none if it does not matter.

    ``value`` is the text of a YAML or Python literal; ``null`` and ``None`` have no meaning of their own.
    """
    lowered = value.lower()
    if lowered in ("null", "none", "~", ""):
        return {}
    if key in SWITCHES and lowered in ("true", "false"):
        name, means = SWITCHES[key]
        return {name: True} if (lowered == "true") is means else {}
    if key == "normalization":
        norm, plus_one = _NORMS.get(lowered, (value, False))
        return {"normalization": norm} | ({"apply-layernorm-1p": True} if plus_one else {})
    if key in ("activation", "activation_func"):
        name = _ACTIVATIONS.get(lowered.rpartition(".")[2] if "." in lowered else lowered, "")
        return {name: True} if name else {}
    if key == "num_query_groups":
        return {"group-query-attention": True, "num-query-groups": value}
    if key == "fp8" and lowered in ("true", "false"):
        return {"fp8-format": "hybrid"} if lowered == "true" else {}
    name = KEYS.get(key, "")
    if not name or (name == "num-virtual-stages-per-pipeline-rank" and value == "1"):
        return {}
    return {name: value}


def switch_text(key: str, *, on: bool) -> str:
    """What a key must say for the switch it stands for to be on or off: ``true`` or ``false``."""
    means = SWITCHES[key][1] if key in SWITCHES else next((m for f, m in DDP_SWITCHES.values() if f == key), True)
    return "true" if on is means else "false"
