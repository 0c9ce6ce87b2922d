"""The architecture facts that each Hugging Face family decides itself: one small function per family.

Each takes the configuration's :class:`~uniap_tune.adapters.hf_keys.Keys` and returns fields of
:class:`~uniap_tune.spec.Model`. They follow the modeling files of ``transformers`` 5.
"""

from __future__ import annotations

from typing import Any

from uniap_tune.spec import Mla, Moe, Norm, Position, QkNorm

from .hf_keys import Keys
from .hf_layers import attention_windows, expert_layers

Facts = dict[str, Any]  # fields of spec.Model


def _layernorm(epsilon_key: str, keys: Keys) -> Facts:
    return {"norm": Norm.LAYERNORM, "norm_bias": True, "norm_epsilon": keys.number(epsilon_key)}


def gpt2(keys: Keys) -> Facts:
    if keys.flag("add_cross_attention"):
        keys.refuse("add_cross_attention", "false (only decoder-only models are known)")
    return {
        **_layernorm("layer_norm_epsilon", keys),
        **_all_biases(True),
        **_learned_positions(keys, extra_rows=0),
        "gated_mlp": False,
        "ffn_size": keys.optional_size("n_inner") or 4 * keys.size("hidden_size"),
    }


def gpt_neox(keys: Keys) -> Facts:
    attention_bias = keys.flag("attention_bias")
    return {
        **_layernorm("layer_norm_eps", keys),
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
        "mlp_bias": True,
        "gated_mlp": False,
        "parallel_residual": keys.flag("use_parallel_residual"),
    }


def opt(keys: Keys) -> Facts:
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


def bloom(keys: Keys) -> Facts:
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


def falcon(keys: Keys) -> Facts:
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


def llama(keys: Keys) -> Facts:
    return {**_attention_biases(keys), "mlp_bias": keys.flag("mlp_bias")}


def llama4(keys: Keys) -> Facts:
    rope_layers = keys.sequence("no_rope_layers")  # 1: has rotary positions, 0: has none
    interval = keys.size("no_rope_layer_interval")
    layers = keys.layers("num_hidden_layers")
    if rope_layers and len(rope_layers) != layers:
        keys.refuse("no_rope_layers", f"a list of num_hidden_layers ({layers}) entries")
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


def mistral(keys: Keys) -> Facts:
    return {"window": keys.optional_size("sliding_window")}


def _qwen_windows(keys: Keys) -> Facts:
    if not keys.flag("use_sliding_window"):
        return {}
    full = keys.count("max_window_layers")  # the first layers attend to everything
    kinds = ["full_attention" if i < full else "sliding_attention" for i in range(keys.layers("num_hidden_layers"))]
    return attention_windows(keys, kinds, keys.optional_size("sliding_window"))


def qwen2(keys: Keys) -> Facts:
    return {**_qwen_windows(keys), "qkv_bias": True}


def qwen3(keys: Keys) -> Facts:
    return {**_attention_biases(keys), **_qwen_windows(keys), "qk_norm": QkNorm.PER_HEAD}


def gemma(keys: Keys) -> Facts:
    # published files say gelu and mean its tanh approximation
    activation = keys.text("hidden_activation") or keys.text("hidden_act")
    return {
        **_attention_biases(keys),
        "norm": Norm.RMSNORM_1P,
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
    }


def gemma2(keys: Keys) -> Facts:
    return {**gemma(keys), **_gemma_details(keys, every=2)}


def gemma3(keys: Keys) -> Facts:
    every = keys.size("sliding_window_pattern")
    return {**gemma(keys), **_gemma_details(keys, every=every), "qk_norm": QkNorm.PER_HEAD}


def _gemma_details(keys: Keys, *, every: int) -> Facts:
    layers = range(keys.layers("num_hidden_layers"))
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    return {
        **attention_windows(keys, kinds, keys.optional_size("sliding_window")),
        "norms_per_layer": 4,
        "attention_softcap": keys.optional_number("attn_logit_softcapping"),
        "logit_softcap": keys.optional_number("final_logit_softcapping"),
    }


def nemotron(keys: Keys) -> Facts:
    return {
        **_attention_biases(keys),
        "norm": Norm.LAYERNORM_1P,
        "norm_bias": True,
        "norm_epsilon": keys.number("norm_eps"),
        "mlp_bias": keys.flag("mlp_bias"),
        "gated_mlp": False,
    }


def mixtral(keys: Keys) -> Facts:
    moe = Moe(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        expert_ffn_size=keys.size("intermediate_size"),
    )
    return {"window": keys.optional_size("sliding_window"), "moe": moe}


def qwen3_moe(keys: Keys) -> Facts:
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


def deepseek_v3(keys: Keys) -> Facts:
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
