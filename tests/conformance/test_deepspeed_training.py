"""Rendered DeepSpeed files start and train on the CPU, with the losses of one process that knows nothing of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.deepspeed_runs import GPT, SCRIPT, deepspeed, free_port, numbers
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.huggingface import parse_config
from uniap_tune.plan import Plan
from uniap_tune.planner import Request
from uniap_tune.planner import run as run_planner
from uniap_tune.render import render
from uniap_tune.space import Knobs
from uniap_tune.spec import DType, Job, Precision
from uniap_tune.strategy import Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def planned(folder: Path, config: dict[str, Any], devices: int, fix: dict[str, str], *, batch: int = 8) -> Plan:
    """The solver's plan with these knobs; its launch files are in the folder."""
    request = Request(
        model=parse_config(config, file="config.json", name="tiny"),
        cluster=read_cluster(f"1x{devices}:a100-80gb"),
        job=Job(global_batch=batch, seq_length=16, precision=Precision(compute=DType.FP32)),
        target=Target.DEEPSPEED,
        knobs=Knobs(fix=fix),
    )
    plan = run_planner(request).plan
    folder.mkdir(exist_ok=True)
    for name, text in render(plan, request.model, request.cluster, request.job).items():
        (folder / name).write_text(text, encoding="utf-8")
    return plan


def train(folder: Path, processes: int, *words: str) -> str:
    """What the script printed."""
    run = deepspeed(["--num_gpus", str(processes), "--master_port", free_port(), str(SCRIPT), *words], folder)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def assert_same_losses(output: str, names: list[str]) -> None:
    losses, reference = numbers(output, "LOSSES"), numbers(output, "REFERENCE")
    assert set(losses) == set(names)
    for name in names:
        assert len(losses[name]) == 2
        assert losses[name] == pytest.approx(reference[name], rel=1e-4), name
        assert losses[name][0] != losses[name][1]


def test_zero_stages(tmp_path: Path) -> None:
    names = []
    for stage in range(4):
        fix = {"zero": str(stage), "pp": "1", "tp": "1", "microbatches": "2"}
        plan = planned(tmp_path / str(stage), GPT, 2, fix)
        assert plan.strategies[0].zero == stage
        names.append(f"z{stage}.json")
        (tmp_path / str(stage) / "ds_config.json").rename(tmp_path / names[-1])
    output = train(tmp_path, 2, "--configs", *names)
    assert_same_losses(output, names)


def test_pipeline_with_the_solvers_split(tmp_path: Path) -> None:
    """Seven layers on two stages cannot be even, and the head is heavy enough that the solver cuts where it says."""
    config = {**GPT, "n_layer": 5}
    plan = planned(tmp_path, config, 2, {"pp": "2", "microbatches": "4"})
    split = json.loads((tmp_path / "pipeline_split.json").read_text(encoding="utf-8"))
    counts = [len(stage.layers) for stage in plan.stages]
    assert counts[0] != counts[1]
    words = ["--model", "pipeline", "--blocks", "5", "--plan", "pipeline_split.json"]
    output = train(tmp_path, 2, *words, "--deepspeed_config", "ds_config.json")
    assert_same_losses(output, ["ds_config.json"])
    for stage, count in enumerate(counts):
        assert f"STAGE {stage} {count} layers of {split['parts']}" in output


def test_pipeline_and_data_parallel(tmp_path: Path) -> None:
    planned(tmp_path, GPT, 4, {"pp": "2", "zero": "1", "microbatches": "2"})
    words = ["--model", "pipeline", "--plan", "pipeline_split.json", "--deepspeed_config", "ds_config.json"]
    assert_same_losses(train(tmp_path, 4, *words), ["ds_config.json"])


def test_tensor_parallel(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    plan = planned(tmp_path, LLAMA, 2, {"tp": "2", "zero": "0", "microbatches": "2"})
    assert plan.strategies[0].tp == 2
    output = train(tmp_path, 2, "--model", "llama", "--deepspeed_config", "ds_config.json")
    assert_same_losses(output, ["ds_config.json"])
