"""``check``: plans for up to 1024 devices are accepted by the real engine here, broken ones are refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.deepspeed_runs import environment
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.deepspeed.check import Case, Verdict, check_cases
from uniap_tune.planner import Request
from uniap_tune.planner import run as run_planner
from uniap_tune.render import render
from uniap_tune.space import Knobs
from uniap_tune.spec import Job
from uniap_tune.strategy import Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

# model, cluster, global batch, sequence length, knobs: from 1 to 175 billion parameters, from 8 to 1024 devices
PLANS: list[tuple[str, str, int, int, dict[str, str]]] = [
    ("llama-3.2-1b", "1x8:a100-80gb", 64, 4096, {}),
    ("gpt2-xl", "2x8:a100-40gb", 64, 1024, {"zero": "2"}),
    ("llama-2-7b", "1x8:h100", 64, 4096, {"tp": "2", "zero": "1"}),
    ("llama-3-8b", "4x8:h100", 128, 8192, {"zero": "3"}),
    ("llama-2-13b", "2x8:a100-80gb", 64, 4096, {"pp": "4"}),
    ("gpt-neox-20b", "8x8:a100-80gb", 256, 2048, {"pp": "8", "zero": "1"}),
    ("qwen3-32b", "16x8:h100", 256, 4096, {"tp": "8", "zero": "3"}),
    ("falcon-40b", "32x8:h100", 512, 2048, {}),
    ("llama-3-70b", "64x8:h100", 1024, 8192, {"tp": "8", "zero": "2"}),
    ("llama-2-70b", "128x8:h100", 2048, 4096, {"zero": "3"}),
    ("gpt-3-175b", "128x8:h100", 2048, 2048, {"pp": "16", "zero": "1"}),
    ("opt-175b", "64x8:a100-80gb", 1024, 2048, {"zero": "3"}),
]

MICRO = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
FOUR_STAGES = (0, 9, 18, 27, 34)
BROKEN: list[tuple[Case, str]] = [
    (
        Case(config=MICRO | {"zero_optimization": {"stage": 2}}, world_size=8, layers=34, parts=FOUR_STAGES),
        "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism",
    ),
    (Case(config=MICRO, world_size=8, layers=34, parts=(0, 11, 22, 34)), "3 pipeline stages do not divide"),
    (Case(config=MICRO | {"train_batch_size": 24}, world_size=8), "24 != 1 * 4 * 8"),
    (Case(config=MICRO | {"tensor_parallel": {"autotp_size": 3}}, world_size=8), "3 does not divide"),
    (Case(config=MICRO | {"zero_optimization": {"stage": 1, "overlap_com": True}}, world_size=8), "overlap_com"),
    (
        Case(config=MICRO | {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}}, world_size=64),
        "needs ZeRO stage 3",
    ),
]


def planned(model: str, cluster: str, batch: int, length: int, fix: dict[str, str]) -> tuple[Case, dict[str, str]]:
    """The case of a plan, and its launch files."""
    request = Request(
        model=read_model(model),
        cluster=read_cluster(cluster),
        job=Job(global_batch=batch, seq_length=length),
        target=Target.DEEPSPEED,
        knobs=Knobs(fix=fix),
    )
    plan = run_planner(request).plan
    files = render(plan, request.model, request.cluster, request.job)
    parts = json.loads(files["pipeline_split.json"])["parts"] if plan.pp > 1 else ()
    config: dict[str, Any] = json.loads(files["ds_config.json"])
    case = Case(config=config, world_size=request.cluster.num_devices, layers=len(plan.strategies), parts=tuple(parts))
    return case, files


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    """Of all plans, then of all broken cases, in one process of DeepSpeed's."""
    cases = [planned(*row)[0] for row in PLANS] + [case for case, _ in BROKEN]
    return check_cases(cases)


@pytest.mark.parametrize("index", range(len(PLANS)), ids=[f"{row[0]}-{row[1]}" for row in PLANS])
def test_plans_are_accepted(index: int, verdicts: list[Verdict]) -> None:
    verdict = verdicts[index]
    assert not verdict.refused, verdict.reason
    assert verdict.roles >= 2, verdict.reason
    assert verdict.version == version("deepspeed")


@pytest.mark.parametrize("index", range(len(BROKEN)), ids=[reason for _, reason in BROKEN])
def test_broken_ones_are_refused_with_a_reason(index: int, verdicts: list[Verdict]) -> None:
    verdict = verdicts[len(PLANS) + index]
    assert verdict.refused, verdict.sentence
    assert BROKEN[index][1] in verdict.reason


def test_the_command(tmp_path: Path) -> None:
    """On a rendered folder: the split beside the configuration is used."""
    for name, text in planned(*PLANS[4])[1].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "uniap_tune", "deepspeed", "check", "ds_config.json", "--json", "--world-size"]
    answers = {}
    for world in ("16", "18"):
        run = subprocess.run(
            [*command, world], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        answers[world] = (run.returncode, json.loads(run.stdout))
    code, answer = answers["16"]
    assert (code, answer["status"]) == (0, "accepted")
    assert answer["roles"] >= 4
    code, answer = answers["18"]
    assert (code, answer["status"]) == (2, "refused")
    assert "4 pipeline stages do not divide the world size 18" in answer["reason"]


def test_plan_tries_what_it_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uniap_tune", "plan", "gpt2", "--cluster", "1x4:h100", "--global-batch", "64"]
    command += ["--seq-length", "1024", "--target", "deepspeed", "--fix", "pp=2", "-o", str(tmp_path / "plan")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"DeepSpeed {version('deepspeed')} accepts it; engine built for 3 kinds of ranks" in run.stderr
    assert (tmp_path / "plan" / "pipeline_split.json").exists()
