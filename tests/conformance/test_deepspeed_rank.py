"""What the real DeepSpeed holds on a rank and sends, on the CPU, against the bytes that we count."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conformance.counting import counting_costs, link_bytes
from tests.conformance.deepspeed_runs import deepspeed, free_port, numbers
from uniap_tune.accumulation import zero_refusal
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.runtime import default_runtime
from uniap_tune.graph import LayerKind, LayerType, build_graph
from uniap_tune.spec import DType, Job, Precision
from uniap_tune.strategy import CAPABILITIES, Strategy, Target
from uniap_tune.weights import layer_parameters

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


@dataclass(frozen=True, slots=True)
class Case:
    """A ZeRO stage, the bytes of an accumulated gradient, and whether parameters are of 16 bits."""

    zero: int
    gradient: int = 2
    mixed: bool = True

    @property
    def file(self) -> str:
        return f"z{self.zero}-{self.gradient}-{'bf16' if self.mixed else 'fp32'}.json"

    @property
    def job(self) -> Job:
        compute = DType.BF16 if self.mixed else DType.FP32
        return replace(JOB, precision=Precision(compute=compute, gradient_bytes=self.gradient))

    def write(self, folder: Path, **zero: object) -> None:
        """Its configuration."""
        section = {"stage": self.zero, "contiguous_gradients": True, "reduce_bucket_size": BUCKET} | zero
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "bf16": {"enabled": self.mixed},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": section | ({"stage3_param_persistence_threshold": 0} if self.zero == 3 else {}),
        }
        if self.mixed and self.gradient == 4:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        (folder / self.file).write_text(json.dumps(config), encoding="utf-8")


CASES = [Case(0), Case(1), Case(2), Case(1, 4), Case(2, 4), *(Case(zero, 4, mixed=False) for zero in range(3))]
LONE_CASES = [Case(3), Case(3, 4), Case(3, 4, mixed=False)]  # what ZeRO-3 leaves behind would be counted
STAGE_CASES = [Case(0), Case(1), Case(1, 4)]


def held(case: Case) -> float:
    """States of all layers and the buckets, which ZeRO-2 has only during a backward pass."""
    cluster = read_cluster(f"1x{RANKS}:a100-80gb")
    engine = CAPABILITIES[Target.DEEPSPEED]
    runtime = default_runtime(engine, MODEL, cluster)
    strategy = Strategy(dp=RANKS, zero=case.zero)
    with_buckets, without = (
        CostModel(MODEL, cluster, case.job, engine, runtime=replace(runtime, gradient_bucket=size))
        for size in (BUCKET, 0)
    )
    buckets = with_buckets.buffer_bytes(strategy, samples=1) - without.buffer_bytes(strategy, samples=1)
    buckets *= case.zero != 2
    return buckets + sum(
        with_buckets.layer_cost(layer, strategy, samples=1, pp=1, num_microbatches=MICRO_BATCHES).static
        for layer in LAYERS
    )


def sent_bytes(case: Case, layers: Sequence[LayerType] = LAYERS, *, dp: int = RANKS, pp: int = 1) -> float:
    """Bytes over a rank's link in a step."""
    costs = counting_costs(MODEL, case.job, Target.DEEPSPEED, dp * pp)
    strategy = Strategy(dp=dp, zero=case.zero)
    return sum(link_bytes(costs, layer, strategy, MICRO_BATCHES, pp=pp) for layer in layers)


def found(words: Sequence[str], ranks: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What a script says it held and sent, by configuration."""
    done = deepspeed(["--num_gpus", str(ranks), "--master_port", free_port(), *words], folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return numbers(done.stdout, "HELD"), numbers(done.stdout, "SENT")


@pytest.mark.parametrize("cases", [CASES, *([case] for case in LONE_CASES)])
def test_an_engine_holds_and_sends_what_we_count(tmp_path: Path, cases: Sequence[Case]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    for case in cases:
        case.write(tmp_path, overlap_comm=True)
    script = Path(__file__).with_name("deepspeed_rank.py")
    bytes_held, bytes_sent = found([str(script), "model.json", *(case.file for case in cases)], RANKS, tmp_path)
    for case in cases:
        assert bytes_held[case.file][0] == pytest.approx(held(case), rel=0.02), case
        assert bytes_sent[case.file][0] == pytest.approx(sent_bytes(case), rel=0.02), case


@pytest.mark.parametrize("dp", [1, 2])
def test_a_stage_holds_and_sends_what_we_count(tmp_path: Path, dp: int) -> None:
    for case in STAGE_CASES:
        case.write(tmp_path, reduce_bucket_size=50_000)
    script = Path(__file__).with_name("deepspeed_stage.py")
    bytes_held, bytes_sent = found([str(script), *(case.file for case in STAGE_CASES)], 2 * dp, tmp_path)
    block = next(layer for layer in LAYERS if layer.kind is LayerKind.BLOCK)
    parameters = layer_parameters(MODEL, block)
    for case in STAGE_CASES:
        costs = counting_costs(MODEL, case.job, Target.DEEPSPEED, 2 * dp)
        strategy = Strategy(dp=dp, zero=case.zero)
        expected = costs.layer_cost(block, strategy, samples=1, pp=2, num_microbatches=MICRO_BATCHES).static
        assert bytes_held[case.file][0] == pytest.approx(expected / parameters, rel=0.02), case
        sent = sent_bytes(case, [block], dp=dp, pp=2)
        assert bytes_sent[case.file][0] == pytest.approx(sent / parameters, rel=0.02, abs=0.01), case


def test_without_zero_it_refuses_to_accumulate_in_another_dtype(tmp_path: Path) -> None:
    case = Case(0, 4)
    case.write(tmp_path)
    script = str(Path(__file__).with_name("deepspeed_stage.py"))
    done = deepspeed(["--num_gpus", "2", "--master_port", free_port(), script, case.file], tmp_path)
    assert done.returncode != 0
    assert "unsupported mix of model_dtype" in done.stdout + done.stderr
    assert zero_refusal(case.job, CAPABILITIES[Target.DEEPSPEED], 0)
