"""What each Hugging Face ``model_type`` means: the names of its keys, its defaults, and its own architecture facts.

Keys, defaults and architecture follow the configuration and modeling files of ``transformers`` 5 for each family;
``tests/conformance/test_transformers_parameters.py`` builds the real models and compares them to the last parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import hf_facts
from .hf_facts import Facts
from .hf_keys import Keys


@dataclass(frozen=True, slots=True)
class Family:
    """One ``model_type``.

    Attributes:
        facts: the fields of :class:`~uniap_tune.spec.Model` that this family decides itself.
        defaults: values of absent keys, as the family's configuration class has them. Sizes that every published
            configuration carries have none: without them a model would be a guess.
        names: the family's names of common keys.
        own_sizes: fields of the model that ``facts`` derives from keys of its own, not from the common ones.
    """

    facts: Callable[[Keys], Facts]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_sizes: frozenset[str] = frozenset()


_GPT2_NAMES = {
    "hidden_size": ("n_embd", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "max_position_embeddings": ("n_positions", "max_position_embeddings"),
    "hidden_act": ("activation_function",),
    "attention_dropout": ("attn_pdrop",),
    "hidden_dropout": ("resid_pdrop",),
}
_GPT2_DEFAULTS = {
    "max_position_embeddings": 1024,
    "hidden_act": "gelu_new",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_GPT_NEOX_DEFAULTS = {
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.25,
}
_OPT_NAMES = {
    "intermediate_size": ("ffn_dim",),
    "hidden_act": ("activation_function",),
    "hidden_dropout": ("dropout",),
}
_OPT_DEFAULTS = {
    "hidden_act": "relu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,  # torch's LayerNorm default; not a key of this family
    "hidden_dropout": 0.1,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_BLOOM_NAMES = {
    "hidden_size": ("n_embed", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
}
_FALCON_DEFAULTS = {
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
_SILU = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# published files leave these sizes out (google/gemma-3-4b-pt)
_GEMMA3_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_QWEN_DEFAULTS = {
    **_SILU,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA4_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 131_072,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "rope_theta": 500_000.0,
}
_QWEN3_MOE_DEFAULTS = {
    **_QWEN_DEFAULTS,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
_DEEPSEEK_V3_DEFAULTS = {
    **_SILU,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
}

_OWN_FFN = frozenset({"ffn_size"})

# Multimodal configurations hold the text model's under text_config.
MULTIMODAL: Mapping[str, str] = {"gemma3": "gemma3_text", "llama4": "llama4_text"}

FAMILIES: Mapping[str, Family] = {
    "bloom": Family(hf_facts.bloom, {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}, _BLOOM_NAMES, _OWN_FFN),
    "deepseek_v3": Family(
        hf_facts.deepseek_v3,
        _DEEPSEEK_V3_DEFAULTS,
        {"num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers")},
        frozenset({"head_dim", "num_kv_heads"}),
    ),
    "falcon": Family(
        hf_facts.falcon,
        _FALCON_DEFAULTS,
        {"hidden_act": ("activation",), "hidden_size": ("n_embed", "hidden_size")},
        frozenset({"ffn_size", "num_kv_heads"}),
    ),
    "gemma": Family(hf_facts.gemma, {**_GEMMA_DEFAULTS, "num_key_value_heads": 16}),
    "gemma2": Family(hf_facts.gemma2, _GEMMA2_DEFAULTS),
    "gemma3_text": Family(hf_facts.gemma3, _GEMMA3_DEFAULTS),
    "gpt2": Family(hf_facts.gpt2, _GPT2_DEFAULTS, _GPT2_NAMES, _OWN_FFN),
    "gpt_neox": Family(
        hf_facts.gpt_neox,
        _GPT_NEOX_DEFAULTS,
        {"rope_theta": ("rotary_emb_base", "rope_theta"), "partial_rotary_factor": ("rotary_pct",)},
    ),
    "llama": Family(hf_facts.llama, {**_SILU, "max_position_embeddings": 2048}),
    "llama4_text": Family(hf_facts.llama4, _LLAMA4_DEFAULTS),
    "mistral": Family(
        hf_facts.mistral,
        {**_SILU, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "mixtral": Family(
        hf_facts.mixtral,
        {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1_000_000.0,
        },
        {"num_local_experts": ("num_local_experts", "num_experts")},
    ),
    "nemotron": Family(
        hf_facts.nemotron,
        {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
    ),
    "opt": Family(hf_facts.opt, _OPT_DEFAULTS, _OPT_NAMES),
    "phi3": Family(
        hf_facts.mistral,
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        {"hidden_dropout": ("resid_pdrop",)},
    ),
    "qwen2": Family(hf_facts.qwen2, _QWEN_DEFAULTS),
    "qwen3": Family(hf_facts.qwen3, {**_QWEN_DEFAULTS, "head_dim": 128}),
    "qwen3_moe": Family(hf_facts.qwen3_moe, _QWEN3_MOE_DEFAULTS, {"num_experts": ("num_experts", "num_local_experts")}),
}
