"""A plan.json gives back the model, the cluster and the job it was made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.plan_json import is_plan, plan_file, read_plan
from uniap_tune.adapters.registry import read_model
from uniap_tune.errors import InputError
from uniap_tune.planner import Request
from uniap_tune.spec import DType, Job, OptimizerName, Precision, Recompute
from uniap_tune.strategy import Strategy, Target

JOBS = {
    "plain": Job(global_batch=16, seq_length=1024),
    "unusual": Job(
        global_batch=16,
        seq_length=1024,
        precision=Precision(compute=DType.FP16, master_weights=False, gradient_bytes=4),
        optimizer=OptimizerName.SGD,
        optimizer_state_bytes=0,
        flash_attention=False,
        allowed_recompute=frozenset({Recompute.NONE}),
    ),
}


def document(model: str = "gpt2", cluster: str = "2x8:h100", job: Job = JOBS["plain"]) -> dict[str, Any]:
    """A plan as JSON has it."""
    request = Request(model=read_model(model), cluster=read_cluster(cluster), job=job)
    made = make_plan(Target.MEGATRON, [request.model.num_layers], Strategy(dp=16, zero=1), job, microbatches=1)
    data: dict[str, Any] = json.loads(replace(made, inputs=request.describe()).to_json())
    return data


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("cluster", ["2x8:h100", "1x8:a100-40gb"])
@pytest.mark.parametrize("model", ["gpt2", "mixtral-8x7b", "deepseek-v3", "gemma-2-9b"])
def test_round_trip(model: str, cluster: str, job: str) -> None:
    found = plan_file(document(model, cluster, JOBS[job]), "plan.json")
    assert found.model == read_model(model)
    assert found.cluster == read_cluster(cluster)
    assert found.job == JOBS[job]
    assert found.plan.num_microbatches == 1


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def value(new: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = new

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("inputs", "model"),
        without("inputs", "model", "num_layers"),
        without("inputs", "job", "precision"),
        without("inputs", "cluster", "num_nodes"),
        value("square", "inputs", "model", "norm"),
        value(7, "inputs", "job"),
        value(-1, "inputs", "job", "global_batch"),
        value(0, "schema_version"),
        value([], "stages"),
        value(2, "pp"),
        value("gpt", "inputs", "model", "num_heads"),
        lambda data: data["stages"][0]["strategies"].pop(),
        lambda data: data["stages"][0]["layers"].pop(),
    ],
)
def test_what_was_changed_by_hand_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    data = document()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError):
        read_plan(path)


def test_what_is_a_plan() -> None:
    assert is_plan(document())
    assert not is_plan({"train_batch_size": 8})
