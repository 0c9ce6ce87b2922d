"""Plans of real models follow physics: memory, batch and devices change them the way they must."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.cli import main
from uniap_tune.plan import Plan
from uniap_tune.planner import plan
from uniap_tune.spec import Cluster, Job, Recompute

LLAMA = ["llama-2-7b", "--cluster", "1x8:a100-80gb", "--global-batch", "128", "--seq-length", "4096"]


@cache
def planned(
    model: str = "llama-2-7b",
    cluster: str = "1x8:a100-80gb",
    batch: int = 128,
    target: str = "megatron",
    memory: float = 1.0,
    seq_length: int = 4096,
) -> Plan:
    """The plan of a named case; ``memory``: part of each device's memory that is left."""
    place = read_cluster(cluster)
    place = replace(place, device=replace(place.device, memory_bytes=memory * place.device.memory_bytes))
    return plan(read_model(model), place, Job(global_batch=batch, seq_length=seq_length), target=target)


def check_sound(found: Plan, num_layers: int, cluster: Cluster, batch: int) -> None:
    """Every layer on one stage, the memory within the limit, the devices used exactly."""
    names = [name for interval in found.virtual_stage_layers() for name in interval]
    assert names == ["embedding", *(f"layers.{i}" for i in range(num_layers)), "head"]
    assert all(stage.layers for stage in found.stages)
    assert found.pp == len(found.stages)
    assert found.peak_memory_bytes <= found.memory_limit_bytes * (1 + 1e-12)
    assert found.memory_limit_bytes <= cluster.device.memory_bytes
    for strategy in found.strategies:
        assert strategy.tp * strategy.dp * strategy.cp * found.pp == cluster.num_devices
        assert batch % (found.num_microbatches * strategy.dp) == 0
    assert found.status == "optimal"
    assert found.gap <= 1e-4
    assert found.bound_s <= found.objective_s
    assert 0.05 < found.mfu < 1


CASES = [
    *((("llama-2-7b", "1x8:a100-80gb", 128, target)) for target in ("megatron", "deepspeed", "any")),
    ("llama-2-13b", "2x8:a100-40gb", 64, "megatron"),
    ("llama-3-8b", "1x8:h100", 64, "any"),
    ("llama-3-70b", "4x8:h100", 128, "megatron"),
    ("mistral-7b", "2x4:a100-80gb", 32, "deepspeed"),
    ("qwen3-32b", "4x8:h100", 128, "megatron"),
    ("qwen3-30b-a3b", "2x8:h100", 64, "megatron"),
]


@pytest.mark.parametrize(("model", "cluster", "batch", "target"), CASES)
def test_plans_are_sound(model: str, cluster: str, batch: int, target: str) -> None:
    found = planned(model, cluster, batch, target)
    check_sound(found, read_model(model).num_layers, read_cluster(cluster), batch)


def cli(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", *LLAMA, *options]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_must_show(capsys: pytest.CaptureFixture[str]) -> None:
    """The acceptance line of the planner."""
    data = cli(capsys, "--target", "megatron", "--json")
    assert data["schema_version"] == 1
    assert data["status"] == "optimal"
    assert 0 <= data["gap"] <= 1e-4
    names = [name for stage in data["stages"] for name in stage["layers"]]
    assert names == ["embedding", *(f"layers.{i}" for i in range(32)), "head"]
    for stage in data["stages"]:
        assert sum(stage["memory"].values()) <= data["memory_limit_bytes"] * (1 + 1e-12)
        for strategy in stage["strategies"]:
            assert strategy["tp"] * strategy["dp"] * strategy["cp"] * data["pp"] == 8
    assert data["peak_memory_bytes"] <= data["memory_limit_bytes"] < 80 * 2**30
    assert data["tokens_per_s"] == pytest.approx(128 * 4096 / data["step_time_s"])
    # 6 FLOPs a parameter and token at the A100's 312 TFLOP/s is the least a step can take
    assert data["step_time_s"] > 6 * 6.6e9 * 128 * 4096 / (8 * 312e12)
    for pair in data["solver"]["pairs"]:
        if pair["bound_s"] is not None:
            assert pair["bound_s"] >= data["bound_s"] * (1 - 1e-9)
        if pair["outcome"] == "pruned":
            assert pair["bound_s"] >= data["objective_s"] * (1 - 1e-9)


def sharding(found: Plan) -> tuple[int, int, int]:
    """How hard a plan works to save memory: recomputed blocks, model-parallel degree, ZeRO."""
    blocks = sum(s.recompute is not Recompute.NONE for s in found.strategies)
    first = found.strategies[0]
    return blocks, first.tp * found.pp, first.zero


@pytest.mark.parametrize("target", ["megatron", "deepspeed", "any"])
def test_half_the_memory(target: str) -> None:
    """Never faster; something is sharded or recomputed that was not."""
    whole, half = planned(target=target), planned(target=target, memory=0.5)
    assert half.objective_s >= whole.objective_s * (1 - 1e-4)
    assert half.peak_memory_bytes < whole.peak_memory_bytes
    assert half.strategies != whole.strategies or half.num_microbatches > whole.num_microbatches
    assert max(b - a for a, b in zip(sharding(whole), sharding(half), strict=True)) > 0 or (
        half.micro_batch_size < whole.micro_batch_size
    )


def test_ever_less_memory_is_never_faster() -> None:
    times = [planned(memory=part).objective_s for part in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25)]
    assert all(b >= a * (1 - 1e-4) for a, b in pairwise(times))
    assert times[-1] > times[0]


@pytest.mark.parametrize("target", ["megatron", "deepspeed"])
def test_double_batch(target: str) -> None:
    """Twice the work: at most twice the time (once-a-step work and bubbles are shared), and not much less."""
    once, twice = planned(target=target), planned(target=target, batch=256)
    assert 1.9 * once.objective_s < twice.objective_s <= 2 * once.objective_s * (1 + 1e-4)
    assert twice.tokens_per_s >= once.tokens_per_s * (1 - 1e-4)


@pytest.mark.parametrize("target", ["megatron", "deepspeed"])
def test_sixteen_devices(target: str) -> None:
    """Faster, but not twice as fast: the nodes have a slower network between them."""
    eight, sixteen = planned(target=target), planned(target=target, cluster="2x8:a100-80gb")
    assert eight.objective_s / 2 * (1 - 1e-4) < sixteen.objective_s < 0.65 * eight.objective_s
    assert sixteen.mfu <= eight.mfu * 1.02


def test_double_sequence_is_more_than_double_the_time_a_sample() -> None:
    """Half the samples of twice the length: the same tokens, more attention."""
    short, long = planned(), planned(batch=64, seq_length=8192)
    assert short.objective_s < long.objective_s < 1.5 * short.objective_s


def test_a_faster_device_is_faster() -> None:
    assert planned(cluster="1x8:h100").objective_s < 0.75 * planned().objective_s


def test_the_free_target_is_the_best_under_its_own_prices() -> None:
    from uniap_tune.explain.whatif import target_prices
    from uniap_tune.planner import Request, run
    from uniap_tune.strategy import Target

    for cluster in ("1x8:a100-80gb", "1x8:a100-40gb"):
        request = Request(
            model=read_model("llama-2-7b"),
            cluster=read_cluster(cluster),
            job=Job(global_batch=128, seq_length=4096),
            target=Target.ANY,
        )
        prices = target_prices(run(request), (Target.MEGATRON, Target.DEEPSPEED))
        assert all(price is not None and price >= -1e-4 for price in prices.values()), prices


def test_two_runs_write_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("megatron", "deepspeed"):
        folders = [tmp_path / f"{target}{n}" for n in range(2)]
        for folder in folders:
            cli(capsys, "--target", target, "--json", "-o", str(folder))
        files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
        assert files[0] == files[1]
        assert {"plan.json", "launch.sh"} <= {str(name) for name in files[0]}


def test_the_file_and_the_output_are_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = cli(capsys, "--json", "-o", str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {key: data[key] for key in written} == written
    assert set(data) - set(written) <= {"solver", "alternatives", "restrictions"}
