"""Parameters of one rank against megatron-core's own models, built on the meta device under a fake process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from uniap_tune.adapters.huggingface import read_model
from uniap_tune.graph import build_graph
from uniap_tune.spec import Model, Norm, QkNorm
from uniap_tune.weights import rank_parameters, rank_shared_parameters

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of every optional package that is not there
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

# megatron-core warns of its own defaults and of optional kernels
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:megatron.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron.*"),
]
WORLD_SIZE = 64


@contextmanager
def ranks(tp: int, pp: int = 1, ep: int = 1, etp: int = 1, *, rank: int = 0) -> Iterator[None]:
    """Megatron's process groups of one rank, without any process."""
    torch.distributed.init_process_group("fake", store=FakeStore(), world_size=WORLD_SIZE, rank=rank)
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def transformer_config(model: Model, tp: int, pp: int, ep: int, etp: int) -> Any:
    """The TransformerConfig of a model."""
    experts: dict[str, Any] = {}
    if model.moe is not None:
        experts = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            "moe_ffn_hidden_size": model.moe.expert_ffn_size,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": etp,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        gated_linear_unit=model.gated_mlp,
        activation_func=torch.nn.functional.silu if model.gated_mlp else torch.nn.functional.gelu,
        normalization="RMSNorm" if model.norm is Norm.RMSNORM else "LayerNorm",
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm is QkNorm.PER_HEAD,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        **experts,
    )


def megatron_parameters(config: Any, model: Model, padded_vocab: int, *, first: bool = True, last: bool = True) -> int:
    """Parameters of the rank's GPTModel."""
    if model.moe is not None:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    with torch.device("meta"):
        built = GPTModel(
            config,
            spec,
            vocab_size=padded_vocab,
            max_sequence_length=model.position_rows or 4096,
            position_embedding_type="learned_absolute" if model.position_rows else "rope",
            share_embeddings_and_output_weights=model.tied_embeddings,
            pre_process=first,
            post_process=last,
        )
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What building a model does on a device besides building it."""
    # a mixture-of-experts layer makes a stream for its shared experts
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    # the stages that share the embedding agree on its values
    monkeypatch.setattr(GPTModel, "setup_embeddings_and_output_layer", Mock())


@pytest.mark.parametrize(
    ("name", "tp", "ep", "etp"),
    [
        ("llama-3-8b", 2, 1, 1),
        ("llama-3-8b", 16, 1, 1),  # more ranks than key/value heads
        ("qwen3-8b", 4, 1, 1),
        ("qwen2.5-7b", 4, 1, 1),
        ("gpt-3-175b", 8, 1, 1),
        ("gpt2-xl", 1, 1, 1),  # padded vocabulary
        ("mixtral-8x7b", 2, 4, 2),
        ("mixtral-8x7b", 4, 8, 1),
        ("qwen3-30b-a3b", 2, 8, 1),
    ],
)
def test_one_rank_holds_what_megatron_builds(name: str, tp: int, ep: int, etp: int) -> None:
    model = replace(read_model(name), num_layers=2)
    padded_vocab = -(-model.vocab_size // (128 * tp)) * 128 * tp
    with ranks(tp, ep=ep, etp=etp):
        real = megatron_parameters(transformer_config(model, tp, 1, ep, etp), model, padded_vocab)
    ours = sum(
        rank_parameters(model, layer.type, tp, ep=ep, etp=etp, padded_vocab=padded_vocab)
        for layer in build_graph(model).layers
    )
    assert ours - rank_shared_parameters(model, tp, padded_vocab=padded_vocab) == real


def test_the_last_stage_has_its_own_copy_of_a_tied_head() -> None:
    model = replace(read_model("gpt-22b"), num_layers=4)
    with ranks(2, 2, rank=WORLD_SIZE - 1):
        config = transformer_config(model, 2, 2, 1, 1)
        real = megatron_parameters(config, model, model.vocab_size, first=False)
    ours = sum(rank_parameters(model, layer.type, 2) for layer in build_graph(model).layers[3:])
    assert ours == real
