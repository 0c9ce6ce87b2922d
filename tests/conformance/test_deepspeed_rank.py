"""What the real DeepSpeed holds on a rank and sends, on the CPU, against the bytes that we count."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.counting import counting_costs, link_bytes
from tests.conformance.deepspeed_runs import deepspeed, free_port, numbers
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.runtime import default_runtime
from uniap_tune.graph import build_graph
from uniap_tune.spec import Job
from uniap_tune.strategy import CAPABILITIES, Strategy, Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

LLAMA = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BUCKET = 1_000_000
RANKS = 2
MICRO_BATCHES = 2
MODEL = parse_config({"model_type": "llama", **LLAMA}, file="config.json", name="tiny")
LAYERS = [layer.type for layer in build_graph(MODEL).layers]
JOB = Job(global_batch=MICRO_BATCHES * RANKS, seq_length=8)


def held(stage: int) -> float:
    """States of all layers and the buckets, which ZeRO-2 has only during a backward pass."""
    cluster = read_cluster(f"1x{RANKS}:a100-80gb")
    engine = CAPABILITIES[Target.DEEPSPEED]
    runtime = default_runtime(engine, MODEL, cluster)
    strategy = Strategy(dp=RANKS, zero=stage)
    with_buckets, without = (
        CostModel(MODEL, cluster, JOB, engine, runtime=replace(runtime, gradient_bucket=size)) for size in (BUCKET, 0)
    )
    buckets = with_buckets.buffer_bytes(strategy, samples=1) - without.buffer_bytes(strategy, samples=1)
    buckets *= stage != 2
    return buckets + sum(
        with_buckets.layer_cost(layer, strategy, samples=1, pp=1, num_microbatches=MICRO_BATCHES).static
        for layer in LAYERS
    )


def sent_bytes(stage: int) -> float:
    """Bytes over a rank's link in a step."""
    costs = counting_costs(MODEL, JOB, Target.DEEPSPEED, RANKS)
    return sum(link_bytes(costs, layer, Strategy(dp=RANKS, zero=stage), MICRO_BATCHES) for layer in LAYERS)


def test_an_engine_holds_and_sends_what_we_count(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    names = []
    for stage in range(4):
        zero = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": BUCKET, "overlap_comm": True}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": zero | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
        names.append(f"z{stage}.json")
        (tmp_path / names[-1]).write_text(json.dumps(config), encoding="utf-8")
    script = Path(__file__).with_name("deepspeed_rank.py")
    words = ["--num_gpus", str(RANKS), "--master_port", free_port(), str(script), "model.json", *names]
    done = deepspeed(words, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found, sent = (numbers(done.stdout, what) for what in ("HELD", "SENT"))
    for stage, name in enumerate(names):
        assert found[name][0] == pytest.approx(held(stage), rel=0.02), name
        assert sent[name][0] == pytest.approx(sent_bytes(stage), rel=0.02), name
