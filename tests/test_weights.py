"""Parameter counts and their cut over ranks, against published figures and by conservation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.graph import LayerKind, LayerType, block_type, build_graph
from uniap_tune.spec import Mla, Model, Moe, Norm, Position, QkNorm
from uniap_tune.weights import (
    Split,
    Weight,
    layer_parameters,
    parameter_count,
    rank_expert_parameters,
    rank_parameters,
    rank_shared_parameters,
    weights,
)

EMBEDDING = LayerType(kind=LayerKind.EMBEDDING)
BLOCK = LayerType(kind=LayerKind.BLOCK)
EXPERTS = LayerType(kind=LayerKind.BLOCK, moe=True)
HEAD = LayerType(kind=LayerKind.HEAD)


def make(**changes: Any) -> Model:
    """A small dense model of round sizes."""
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_size": 96,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "vocab_size": 256,
    }
    return Model(name="small", family="llama", **{**sizes, **changes})


LLAMA_3_8B = make(
    num_layers=32,
    hidden_size=4096,
    ffn_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def test_llama_3_8b_total() -> None:
    assert parameter_count(LLAMA_3_8B) == 8_030_261_248


def test_llama_3_8b_ranks_match_megatron() -> None:
    # per-rank parameters that megatron-core builds for the layout Et*7|t*9|t*9|t*7,L at tp 2
    embedding, *blocks, head = (rank_parameters(LLAMA_3_8B, layer.type, 2) for layer in build_graph(LLAMA_3_8B).layers)
    assert embedding + sum(blocks[:7]) == 1_026_088_960
    assert sum(blocks[7:16]) == sum(blocks[16:25]) == 981_540_864
    assert sum(blocks[25:]) + head == 1_026_093_056


def test_gpt_formula() -> None:
    # arXiv 2104.04473 section 5.1, which leaves out the 2h of the final norm
    layers, hidden, vocab, seq = 24, 1024, 51200, 2048
    model = make(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=4 * hidden,
        num_heads=16,
        num_kv_heads=16,
        head_dim=hidden // 16,
        vocab_size=vocab,
        norm=Norm.LAYERNORM,
        norm_bias=True,
        position=Position.LEARNED,
        position_rows=seq,
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )
    formula = 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + seq) * hidden
    assert parameter_count(model) == formula + 2 * hidden


def test_tied_head_counts_once_but_has_a_copy_on_its_own_stage() -> None:
    model = make(tied_embeddings=True)
    untied = make()
    matrix = 256 * 64
    assert parameter_count(model) == parameter_count(untied) - matrix
    assert layer_parameters(model, HEAD) == 64
    assert rank_parameters(model, HEAD, 1) == 64 + matrix
    assert rank_shared_parameters(model, 2) == matrix // 2
    assert rank_shared_parameters(untied, 2) == 0


def test_padded_vocabulary_touches_embedding_and_head_only() -> None:
    model = make(vocab_size=250, head_bias=True)
    assert rank_parameters(model, EMBEDDING, 2, padded_vocab=256) == 128 * 64
    assert rank_parameters(model, HEAD, 2, padded_vocab=256) == 128 * 64 + 128 + 64
    assert rank_parameters(model, BLOCK, 2, padded_vocab=256) == rank_parameters(model, BLOCK, 2)


def test_learned_positions_norms_and_row_biases_are_replicated() -> None:
    model = make(position_rows=10, embedding_norm=True, norm_bias=True, attention_out_bias=True, mlp_bias=True)
    kept = {w.name for t in (EMBEDDING, BLOCK) for w in weights(model, t) if w.split is Split.REPLICATED}
    assert kept == {
        "embedding.position",
        "embedding.norm.weight",
        "embedding.norm.bias",
        "norm.0.weight",
        "norm.0.bias",
        "norm.1.weight",
        "norm.1.bias",
        "attention.out.bias",
        "mlp.down.bias",
    }


def test_tensor_parallelism_beyond_the_key_value_heads_cuts_through_them() -> None:
    # megatron-core cuts the fused projection evenly and gathers its output
    model = make(num_kv_heads=2)
    qkv = (8 + 2 * 2) * 8 * 64
    rest = (64 * 64 + 3 * 64 * 96) // 8 + 2 * 64
    assert rank_parameters(model, BLOCK, 8) == qkv // 8 + rest


def test_projected_embeddings() -> None:
    model = make(embedding_size=16, final_norm=False)
    assert Weight("embedding.project_in", (64, 16)) in weights(model, EMBEDDING)
    assert layer_parameters(model, EMBEDDING) == 256 * 16 + 64 * 16
    assert layer_parameters(model, HEAD) == 256 * 16 + 64 * 16


@pytest.mark.parametrize(("kind", "extra"), [(QkNorm.PER_HEAD, 2 * 8), (QkNorm.FULL, 64 + 32), (QkNorm.L2, 0)])
def test_query_key_norms(kind: QkNorm, extra: int) -> None:
    assert layer_parameters(make(qk_norm=kind), BLOCK) == layer_parameters(make(), BLOCK) + extra


def moe_model(**changes: Any) -> Model:
    moe = Moe(num_experts=8, top_k=2, expert_ffn_size=16, shared_ffn_size=32, first_dense_layers=1)
    return make(moe=replace(moe, **changes))


def test_experts_router_and_shared_experts() -> None:
    model = moe_model(router_bias=True, shared_expert_gate=True)
    attention_and_norms = layer_parameters(make(), BLOCK) - 3 * 64 * 96
    experts, shared, router = 8 * 3 * 64 * 16, 3 * 64 * 32, 8 * 64 + 8
    assert layer_parameters(model, EXPERTS) == attention_and_norms + experts + shared + 64 + router
    assert layer_parameters(model, BLOCK) == layer_parameters(make(), BLOCK)
    assert parameter_count(model) == sum(layer_parameters(model, layer.type) for layer in build_graph(model).layers)


def test_experts_have_their_own_grid() -> None:
    model = moe_model()
    experts = 8 * 3 * 64 * 16
    assert rank_expert_parameters(model, EXPERTS) == experts
    assert rank_expert_parameters(model, EXPERTS, ep=4, etp=2) == experts // 8
    assert rank_expert_parameters(model, BLOCK, ep=4, etp=2) == 0
    whole, cut = rank_parameters(model, EXPERTS, 2), rank_parameters(model, EXPERTS, 2, ep=4, etp=2)
    assert whole - cut == experts - experts // 8


def test_biases_of_experts_follow_their_matrices() -> None:
    model = replace(moe_model(), mlp_bias=True)
    # of an expert's biases, those of the output are whole on every expert-tensor rank
    biases = rank_expert_parameters(model, EXPERTS, ep=2, etp=2) - rank_expert_parameters(
        moe_model(), EXPERTS, ep=2, etp=2
    )
    assert biases == 4 * (2 * 16 // 2 + 64)


def test_latent_attention_of_deepseek_v3() -> None:
    # DeepSeek-V3: 187,107,328 parameters of attention in each layer (arXiv 2412.19437 section 4.2 sizes)
    mla = Mla(q_lora_rank=1536, kv_lora_rank=512, qk_nope_dim=128, qk_rope_dim=64, v_dim=128)
    model = make(hidden_size=7168, num_heads=128, num_kv_heads=128, head_dim=192, mla=mla)
    attention = [w for w in weights(model, BLOCK) if w.name.startswith("attention")]
    assert sum(w.size for w in attention) == 187_107_328
    whole_on_every_rank = 7168 * (1536 + 512 + 64) + 1536 + 512
    assert sum(w.size for w in attention if w.split is Split.REPLICATED) == whole_on_every_rank
    without_rank = replace(model, mla=replace(mla, q_lora_rank=None))
    assert Weight("attention.q", (128 * 192, 7168), Split.COLUMN) in weights(without_rank, BLOCK)


def test_multi_token_prediction_is_part_of_the_head() -> None:
    plain = moe_model()
    model = replace(plain, mtp_layers=1)
    module = layer_parameters(plain, block_type(plain, 3)) + 2 * 64 * 64 + 3 * 64
    assert parameter_count(model) - parameter_count(plain) == module
    # the module reads the embedding: a second copy where it is on another stage
    assert rank_shared_parameters(model, 1) == 256 * 64
    assert rank_shared_parameters(replace(model, tied_embeddings=True), 1) == 256 * 64


@given(
    tp=st.sampled_from([1, 2, 4]),
    gated=st.booleans(),
    biases=st.booleans(),
    tied=st.booleans(),
    positions=st.sampled_from([0, 12]),
)
def test_ranks_together_hold_every_parameter(tp: int, gated: bool, biases: bool, tied: bool, positions: int) -> None:
    """Where tp divides everything, tp ranks hold the cut weights once and the replicated ones tp times."""
    model = make(
        gated_mlp=gated,
        qkv_bias=biases,
        mlp_bias=biases,
        attention_out_bias=biases,
        tied_embeddings=tied,
        position_rows=positions,
    )
    for layer in (EMBEDDING, BLOCK, HEAD):
        every = weights(model, layer)
        replicated = sum(w.size for w in every if w.split is Split.REPLICATED)
        assert rank_parameters(model, layer, tp) * tp == sum(w.size for w in every) + (tp - 1) * replicated
