"""What each Hugging Face ``model_type`` means: the names of its keys, its defaults, and its own architecture facts.

Keys, defaults and architecture follow the configuration and modeling files of ``transformers`` 5 for each family;
``tests/conformance/test_transformers_parameters.py`` builds the real models and compares them to the last parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from uniap_tune.spec import Mla, Moe, Norm, Position, QkNorm

from .hf_keys import Keys
from .hf_layers import attention_windows, expert_layers

Facts = dict[str, Any]  # fields of spec.Model


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


def _layernorm(epsilon_key: str, keys: Keys) -> Facts:
    return {"norm": Norm.LAYERNORM, "norm_bias": True, "norm_epsilon": keys.number(epsilon_key)}


def _gpt2(keys: Keys) -> Facts:
    if keys.flag("add_cross_attention"):
        keys.refuse("add_cross_attention", "false (only decoder-only models are known)")
    return {
        **_layernorm("layer_norm_epsilon", keys),
        **_all_biases(True),
        **_learned_positions(keys, extra_rows=0),
        "gated_mlp": False,
        "ffn_size": keys.optional_size("n_inner") or 4 * keys.size("hidden_size"),
    }


def _gpt_neox(keys: Keys) -> Facts:
    attention_bias = keys.flag("attention_bias")
    return {
        **_layernorm("layer_norm_eps", keys),
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
        "mlp_bias": True,
        "gated_mlp": False,
        "parallel_residual": keys.flag("use_parallel_residual"),
    }


def _opt(keys: Keys) -> Facts:
    if not keys.flag("layer_norm_elementwise_affine"):
        keys.refuse("layer_norm_elementwise_affine", "true (norms without weights are not known)")
    hidden = keys.size("hidden_size")
    embedding = keys.optional_size("word_embed_proj_dim") or hidden
    return {
        **_layernorm("layer_norm_eps", keys),
        **_all_biases(keys.flag("enable_bias")),
        # the table starts at position 2, an inheritance of fairseq's padding index
        **_learned_positions(keys, extra_rows=2),
        "gated_mlp": False,
        "final_norm": keys.flag("do_layer_norm_before") and not keys.flag("_remove_final_layer_norm"),
        "embedding_size": embedding if embedding != hidden else None,
    }


def _bloom(keys: Keys) -> Facts:
    return {
        **_layernorm("layer_norm_epsilon", keys),
        **_all_biases(True),
        "position": Position.ALIBI,
        "max_positions": None,
        "gated_mlp": False,
        "activation": "gelu",
        "embedding_norm": True,
        "ffn_size": 4 * keys.size("hidden_size"),
    }


def _falcon(keys: Keys) -> Facts:
    new = keys.flag("new_decoder_architecture")
    heads = keys.size("num_attention_heads")
    if new:
        kv_heads = keys.optional_size("num_kv_heads") or heads
    else:
        kv_heads = 1 if keys.flag("multi_query") else heads
    parallel = keys.flag("parallel_attn")
    norms = keys.optional_size("num_ln_in_parallel_attn") or (2 if new else 1)
    alibi = keys.flag("alibi")
    return {
        **_layernorm("layer_norm_epsilon", keys),
        **_all_biases(keys.flag("bias")),
        **({"position": Position.ALIBI, "max_positions": None} if alibi else {}),
        "num_kv_heads": kv_heads,
        "ffn_size": keys.optional_size("ffn_hidden_size") or 4 * keys.size("hidden_size"),
        "gated_mlp": False,
        "parallel_residual": parallel or new,
        "norms_per_layer": (2 if norms == 2 else 1) if parallel else 2,
    }


def _llama(keys: Keys) -> Facts:
    return {**_attention_biases(keys), "mlp_bias": keys.flag("mlp_bias")}


def _llama4(keys: Keys) -> Facts:
    rope_layers = keys.sequence("no_rope_layers")  # 1: has rotary positions, 0: has none
    interval = keys.size("no_rope_layer_interval")
    layers = keys.layers("num_hidden_layers")
    rope = rope_layers or [int((i + 1) % interval != 0) for i in range(layers)]
    kinds = ["chunked_attention" if has_rope else "full_attention" for has_rope in rope]
    width = keys.size("intermediate_size")
    step = keys.size("interleave_moe_layer_step")
    listed = keys.sequence("moe_layers")
    experts = listed if listed is not None else list(range(step - 1, layers, step))
    moe = Moe(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        expert_ffn_size=width,
        shared_ffn_size=width,
    )
    return {
        **_attention_biases(keys),
        # a chunk of c tokens attends within itself: priced as a window of c
        **attention_windows(keys, kinds, keys.optional_size("attention_chunk_size")),
        "qk_norm": QkNorm.L2 if keys.flag("use_qk_norm") else QkNorm.NONE,
        "ffn_size": keys.size("intermediate_size_mlp"),
        "moe": expert_layers(keys, "moe_layers", experts, moe),
    }


def _mistral(keys: Keys) -> Facts:
    return {"window": keys.optional_size("sliding_window")}


def _qwen_windows(keys: Keys) -> Facts:
    if not keys.flag("use_sliding_window"):
        return {}
    full = keys.count("max_window_layers")  # the first layers attend to everything
    kinds = ["full_attention" if i < full else "sliding_attention" for i in range(keys.layers("num_hidden_layers"))]
    return attention_windows(keys, kinds, keys.optional_size("sliding_window"))


def _qwen2(keys: Keys) -> Facts:
    return {**_qwen_windows(keys), "qkv_bias": True}


def _qwen3(keys: Keys) -> Facts:
    return {**_attention_biases(keys), **_qwen_windows(keys), "qk_norm": QkNorm.PER_HEAD}


def _gemma(keys: Keys) -> Facts:
    # published files say gelu and mean its tanh approximation
    activation = keys.text("hidden_activation") or keys.text("hidden_act")
    return {
        **_attention_biases(keys),
        "norm": Norm.RMSNORM_1P,
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
    }


def _gemma2(keys: Keys) -> Facts:
    return {**_gemma(keys), **_gemma_details(keys, every=2)}


def _gemma3(keys: Keys) -> Facts:
    every = keys.size("sliding_window_pattern")
    return {**_gemma(keys), **_gemma_details(keys, every=every), "qk_norm": QkNorm.PER_HEAD}


def _gemma_details(keys: Keys, *, every: int) -> Facts:
    layers = range(keys.layers("num_hidden_layers"))
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    return {
        **attention_windows(keys, kinds, keys.optional_size("sliding_window")),
        "norms_per_layer": 4,
        "attention_softcap": keys.optional_number("attn_logit_softcapping"),
        "logit_softcap": keys.optional_number("final_logit_softcapping"),
    }


def _nemotron(keys: Keys) -> Facts:
    return {
        **_attention_biases(keys),
        "norm": Norm.LAYERNORM_1P,
        "norm_bias": True,
        "norm_epsilon": keys.number("norm_eps"),
        "mlp_bias": keys.flag("mlp_bias"),
        "gated_mlp": False,
    }


def _mixtral(keys: Keys) -> Facts:
    moe = Moe(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        expert_ffn_size=keys.size("intermediate_size"),
    )
    return {"window": keys.optional_size("sliding_window"), "moe": moe}


def _qwen3_moe(keys: Keys) -> Facts:
    moe = Moe(
        num_experts=keys.size("num_experts"),
        top_k=keys.size("num_experts_per_tok"),
        expert_ffn_size=keys.size("moe_intermediate_size"),
    )
    step = keys.size("decoder_sparse_step")
    dense = keys.sequence("mlp_only_layers") or []
    experts = [i for i in range(keys.layers("num_hidden_layers")) if (i + 1) % step == 0 and i not in dense]
    window = keys.optional_size("sliding_window") if keys.flag("use_sliding_window") else None
    return {
        **_attention_biases(keys),
        "window": window,
        "qk_norm": QkNorm.PER_HEAD,
        "moe": expert_layers(keys, "mlp_only_layers", experts, moe),
    }


def _deepseek_v3(keys: Keys) -> Facts:
    heads = keys.size("num_attention_heads")
    mla = Mla(
        q_lora_rank=keys.optional_size("q_lora_rank"),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_dim=keys.size("qk_nope_head_dim"),
        qk_rope_dim=keys.size("qk_rope_head_dim"),
        v_dim=keys.size("v_head_dim"),
    )
    moe = Moe(
        num_experts=keys.size("n_routed_experts"),
        top_k=keys.size("num_experts_per_tok"),
        expert_ffn_size=keys.size("moe_intermediate_size"),
        shared_ffn_size=keys.count("n_shared_experts") * keys.size("moe_intermediate_size"),
    )
    dense = keys.count("first_k_dense_replace")
    experts = list(range(dense, keys.layers("num_hidden_layers")))
    return {
        **_attention_biases(keys),
        "num_kv_heads": heads,
        "head_dim": mla.qk_nope_dim + mla.qk_rope_dim,
        "mla": mla,
        "moe": expert_layers(keys, "first_k_dense_replace", experts, moe),
        "mtp_layers": keys.count("num_nextn_predict_layers"),
    }


def _all_biases(bias: bool) -> Facts:
    return {"qkv_bias": bias, "attention_out_bias": bias, "mlp_bias": bias}


def _attention_biases(keys: Keys) -> Facts:
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "attention_out_bias": bias}


def _learned_positions(keys: Keys, *, extra_rows: int) -> Facts:
    longest = keys.size("max_position_embeddings")
    return {"position": Position.LEARNED, "max_positions": longest, "position_rows": longest + extra_rows}


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
    "activation_function": "gelu_new",
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
    "bloom": Family(_bloom, {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}, _BLOOM_NAMES, _OWN_FFN),
    "deepseek_v3": Family(
        _deepseek_v3,
        _DEEPSEEK_V3_DEFAULTS,
        {"num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers")},
        frozenset({"head_dim", "num_kv_heads"}),
    ),
    "falcon": Family(
        _falcon,
        _FALCON_DEFAULTS,
        {"hidden_act": ("activation",), "hidden_size": ("n_embed", "hidden_size")},
        frozenset({"ffn_size", "num_kv_heads"}),
    ),
    "gemma": Family(_gemma, {**_GEMMA_DEFAULTS, "num_key_value_heads": 16}),
    "gemma2": Family(_gemma2, _GEMMA2_DEFAULTS),
    "gemma3_text": Family(_gemma3, _GEMMA3_DEFAULTS),
    "gpt2": Family(_gpt2, _GPT2_DEFAULTS, _GPT2_NAMES, _OWN_FFN),
    "gpt_neox": Family(
        _gpt_neox,
        _GPT_NEOX_DEFAULTS,
        {"rope_theta": ("rotary_emb_base", "rope_theta"), "partial_rotary_factor": ("rotary_pct",)},
    ),
    "llama": Family(_llama, {**_SILU, "max_position_embeddings": 2048}),
    "llama4_text": Family(_llama4, _LLAMA4_DEFAULTS),
    "mistral": Family(
        _mistral,
        {**_SILU, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "mixtral": Family(
        _mixtral,
        {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"num_local_experts": ("num_local_experts", "num_experts")},
    ),
    "nemotron": Family(
        _nemotron,
        {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
    ),
    "opt": Family(_opt, _OPT_DEFAULTS, {"intermediate_size": ("ffn_dim",), "hidden_dropout": ("dropout",)}),
    "phi3": Family(
        _mistral,
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        {"hidden_dropout": ("resid_pdrop",)},
    ),
    "qwen2": Family(_qwen2, _QWEN_DEFAULTS),
    "qwen3": Family(_qwen3, {**_QWEN_DEFAULTS, "head_dim": 128}),
    "qwen3_moe": Family(_qwen3_moe, _QWEN3_MOE_DEFAULTS, {"num_experts": ("num_experts", "num_local_experts")}),
}
