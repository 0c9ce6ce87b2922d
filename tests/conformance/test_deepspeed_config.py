"""Rendered configurations against DeepSpeed's own ``DeepSpeedConfig``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launches import Launch, deepspeed_launches
from uniap_tune.spec import DType, Recompute

CHECK = Path(__file__).with_name("deepspeed_check.py")
LAUNCHES = deepspeed_launches()

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def case(launch: Launch) -> dict[str, Any]:
    """What ``deepspeed_check.py`` reads."""
    grid = launch.plan.strategies[0]
    return {
        "config": json.loads(launch.files()["ds_config.json"]),
        "batch_world": launch.cluster.num_devices if grid.tp > 1 else grid.dp,
    }


def ask(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DeepSpeed's answers."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(CHECK)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    answers: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="session")
def answers() -> list[dict[str, Any]]:
    """What DeepSpeed makes of each launch."""
    return ask([case(launch) for launch in LAUNCHES])


@pytest.mark.parametrize("index", range(len(LAUNCHES)), ids=[launch.name for launch in LAUNCHES])
def test_deepspeed_understands_the_plan(index: int, answers: list[dict[str, Any]]) -> None:
    launch, got = LAUNCHES[index], answers[index]
    assert "error" not in got, got["error"]
    plan, job = launch.plan, launch.job
    grid = plan.strategies[0]
    assert got["stage"] == grid.zero
    assert got["micro_batch"] == plan.micro_batch_size
    assert got["accumulation"] == plan.num_microbatches
    if grid.tp == 1:
        assert got["train_batch_size"] == job.global_batch
    assert got["autotp_size"] == (grid.tp if grid.tp > 1 else 0)
    assert got["bf16"] == (job.precision.compute is DType.BF16)
    assert got["fp16"] == (job.precision.compute is DType.FP16)
    assert got["grad_accum_dtype"] == ("fp32" if job.precision.gradient_bytes == 4 else None)
    if plan.pp > 1:
        recomputes = any(s.recompute is Recompute.FULL for s in plan.strategies)
        assert (got["interval"], got["use_reentrant"]) == (int(recomputes), False)
    if grid.zero == 3:
        assert got["overlap_comm"]
        assert got["persistence"] == 10 * launch.model.hidden_size


def test_deepspeed_refuses_what_is_wrong() -> None:
    """The check itself can fail: a wrong batch, a key ZeRO does not have, a fractional bucket, two precisions."""
    config = case(LAUNCHES[1])["config"]
    zero = config["zero_optimization"]
    broken = [
        config | {"train_batch_size": 7},
        config | {"zero_optimization": zero | {"no_such_key": 1}},
        config | {"zero_optimization": zero | {"reduce_bucket_size": 0.5}},
        config | {"fp16": {"enabled": True}},
    ]
    answers = ask([{"config": entry, "batch_world": 8} for entry in broken])
    assert [set(answer) for answer in answers] == [{"error"}] * 4
