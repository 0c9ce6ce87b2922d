"""Which models the real AutoTP cuts, and what ranks then send and hold, on the CPU, against what we count."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.counting import counting_costs, link_bytes
from tests.conformance.deepspeed_runs import deepspeed, free_port, numbers
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.autotp import tensor_refusal
from uniap_tune.cost.parts import PARAMETERS
from uniap_tune.graph import build_graph
from uniap_tune.spec import Job, Model
from uniap_tune.strategy import Strategy, Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]

RANKS = 2
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **GROUPED},
    "qwen2": {"model_type": "qwen2", **GROUPED, "tie_word_embeddings": False},
    "qwen2-tied": {"model_type": "qwen2", **GROUPED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GROUPED, "tie_word_embeddings": False},
    "qwen3-tied": {"model_type": "qwen3", **GROUPED, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **GROUPED},
    "gemma2": {"model_type": "gemma2", **GROUPED},
    "gemma3": {"model_type": "gemma3_text", **GROUPED},
    "neox": {"model_type": "gpt_neox", **SIZES, "tie_word_embeddings": False},
    "nemotron": {"model_type": "nemotron", **GROUPED},
    "opt": {
        "model_type": "opt",
        "hidden_size": 128,
        "ffn_dim": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    "phi3": {"model_type": "phi3", **GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"model_type": "bloom", "hidden_size": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512},
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "vocab_size": 512,
    },
    "mixtral": {"model_type": "mixtral", **GROUPED, **EXPERTS},
}


def model_of(name: str) -> Model:
    return parse_config(MODELS[name], file="config.json", name=name)


CUT = [name for name in MODELS if not tensor_refusal(model_of(name), RANKS)]
REFUSED = [name for name in MODELS if name not in CUT]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the engine prints for all models: those that fail come last, because they can leave a rank behind."""
    folder = tmp_path_factory.mktemp("tensor")
    names = []
    for name in (*CUT, *REFUSED):
        names.append(f"{name}.json")
        (folder / names[-1]).write_text(json.dumps(MODELS[name]), encoding="utf-8")
    script = Path(__file__).with_name("deepspeed_tensor.py")
    done = deepspeed(["--num_gpus", str(RANKS), "--master_port", free_port(), str(script), *names], folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", CUT)
def test_ranks_send_and_hold_what_we_count(name: str, output: str) -> None:
    model, strategy = model_of(name), Strategy(tp=RANKS)
    costs = counting_costs(model, Job(global_batch=1, seq_length=8), Target.DEEPSPEED, RANKS)
    layers = [layer.type for layer in build_graph(model).layers]
    sent = sum(link_bytes(costs, layer, strategy, 1) for layer in layers)
    # beside it a few numbers a token for a split loss, and gradients of the norms of heads
    assert numbers(output, "SENT")[f"{name}.json"][0] == pytest.approx(sent, rel=0.03)
    states = (costs.layer_cost(layer, strategy, samples=1, pp=1, num_microbatches=1) for layer in layers)
    held = sum(cost.static_bytes[PARAMETERS] for cost in states) / 2
    assert numbers(output, "HELD")[f"{name}.json"][0] == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_refuse_does_not_run(name: str, output: str) -> None:
    assert re.search(rf"^FAILED {name}\.json ", output, re.M)
