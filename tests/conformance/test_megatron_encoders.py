"""Parameters of BERT and T5 on one rank against megatron-core's BertModel and T5Model, built on the meta device."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from tests.conformance.test_megatron_parameters import ranks, transformer_config
from uniap_tune.graph import build_graph
from uniap_tune.spec import Model, Norm, Position
from uniap_tune.weights import rank_parameters, rank_shared_parameters

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of every optional package that is not there
    pytest.importorskip("megatron.core")
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:megatron.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron.*"),
]

BERT = Model(
    name="bert",
    family="bert",
    num_layers=2,
    hidden_size=1024,
    ffn_size=4096,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    vocab_size=29184,
    norm=Norm.LAYERNORM,
    norm_bias=True,
    position=Position.LEARNED,
    position_rows=512,
    gated_mlp=False,
    activation="gelu",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    tied_embeddings=True,
    causal=False,
    token_types=2,
    head_transform=True,
    pooled_head=True,
)
T5 = replace(BERT, name="t5", causal=True, token_types=0, head_transform=False, pooled_head=False, encoder_layers=3)


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (BertModel, T5Model):
        monkeypatch.setattr(kind, "setup_embeddings_and_output_layer", Mock())


def ours(model: Model, tp: int) -> int:
    """Parameters of a rank that holds the whole model."""
    every = sum(rank_parameters(model, layer.type, tp) for layer in build_graph(model).layers)
    return every - rank_shared_parameters(model, tp)


def built(config: Any, model: Model) -> int:
    """Parameters of the rank's module in megatron-core."""
    shared: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "max_sequence_length": model.position_rows or 512,
        "share_embeddings_and_output_weights": model.tied_embeddings,
    }
    with torch.device("meta"):
        if model.encoder_layers:
            stack = replace(config, num_layers=model.encoder_layers)
            module = T5Model(
                config,
                stack,
                encoder_model_with_local_spec(),
                decoder_model_with_local_spec(),
                position_embedding_type="relative" if model.relative_buckets else "learned_absolute",
                relative_attention_num_buckets=model.relative_buckets or 32,
                **shared,
            )
        else:
            module = BertModel(
                config,
                model.token_types,
                bert_layer_local_spec,
                add_binary_head=model.pooled_head,
                **shared,
            )
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(BERT, id="bert"),
        pytest.param(replace(BERT, token_types=0, pooled_head=False), id="bert-without-binary-head"),
        pytest.param(T5, id="t5"),
        pytest.param(replace(T5, tied_embeddings=False, head_bias=False), id="t5-untied"),
        pytest.param(
            replace(T5, position=Position.NONE, position_rows=0, relative_buckets=32), id="t5-relative-positions"
        ),
    ],
)
def test_one_rank_holds_what_megatron_builds(model: Model, tp: int) -> None:
    with ranks(tp):
        assert ours(model, tp) == built(transformer_config(model, tp, 1, 1, 1), model)
