"""Plan -> DeepSpeed configuration and split. That DeepSpeed takes them is shown in tests/conformance."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.launches import Launch, deepspeed_launches, launch
from tests.plans import make_plan
from uniap_tune.errors import UnsupportedError
from uniap_tune.render.deepspeed import deepspeed_config, pipeline_split
from uniap_tune.spec import DType, Precision, Recompute
from uniap_tune.strategy import Strategy, Target


def made(blocks: list[int], strategy: dict[str, Any], model: str = "llama-2-7b", **more: Any) -> Launch:
    """A launch on one node."""
    return launch(model, "1x8:a100-80gb", blocks, strategy, target=Target.DEEPSPEED, **more)


def config(blocks: list[int], strategy: dict[str, Any], model: str = "llama-2-7b", **more: Any) -> dict[str, Any]:
    """Its configuration."""
    case = made(blocks, strategy, model, **more)
    return deepspeed_config(case.plan, case.model, case.job)


def test_batch_keys() -> None:
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    found = config([32], {"dp": 8, "zero": 1}, micro_batch=2, microbatches=4)
    assert [found[name] for name in batch] == [64, 2, 4]
    # under tensor parallelism DeepSpeed would compare train_batch_size to a product over all ranks
    found = config([32], {"tp": 2, "dp": 4}, micro_batch=2, microbatches=4)
    assert [found.get(name) for name in batch] == [None, 2, 4]
    assert found["tensor_parallel"] == {"autotp_size": 2}


def test_zero_stages() -> None:
    assert config([32], {"dp": 8})["zero_optimization"] == {"stage": 0}
    for zero in (1, 2):
        found = config([32], {"dp": 8, "zero": zero})["zero_optimization"]
        assert (found["stage"], found["overlap_comm"], found["reduce_scatter"]) == (zero, True, True)
        assert not any(name.startswith("stage3") for name in found)
    found = config([32], {"dp": 8, "zero": 3})["zero_optimization"]
    assert found["stage3_prefetch_bucket_size"] == 15099494  # 0.9 x 4096^2, whole
    assert found["stage3_param_persistence_threshold"] == 40960


@pytest.mark.parametrize(
    ("model", "bucket"),
    [("gpt2", 50_000_000), ("llama-3-70b", 8192**2), ("gpt-1t", 500_000_000)],
)
def test_bucket_sizes_follow_the_matrices_within_bounds(model: str, bucket: int) -> None:
    layers = {"gpt2": 12, "llama-3-70b": 80, "gpt-1t": 128}[model]
    zero = config([layers], {"dp": 8, "zero": 2}, model, seq_length=1024)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
    assert isinstance(zero["reduce_bucket_size"], int)


def test_precision() -> None:
    assert config([32], {"dp": 8})["bf16"] == {"enabled": True}
    found = config([32], {"dp": 8}, precision=Precision(compute=DType.FP16))
    assert found["fp16"] == {"enabled": True}
    assert "bf16" not in found
    found = config([32], {"dp": 8}, precision=Precision(compute=DType.FP32))
    assert "bf16" not in found
    assert "fp16" not in found
    found = config([32], {"dp": 8, "zero": 1}, precision=Precision(gradient_bytes=4))
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(UnsupportedError) as caught:
        config([32], {"dp": 8}, precision=Precision(gradient_bytes=4))
    assert "fp32 gradients" in caught.value.why


def test_pipelines() -> None:
    case = made([7, 9, 9, 7], {"dp": 2, "zero": 1})
    files = case.files()
    assert set(files) == {"ds_config.json", "launch.sh", "pipeline_split.json"}
    split = json.loads(files["pipeline_split.json"])
    assert split["parts"] == [0, 8, 17, 26, 34]
    assert split["num_stages"] == 4
    assert split["activation_checkpoint_interval"] == 0
    assert (split["layers"][0], split["layers"][8], split["layers"][-1]) == ("embedding", "layers.7", "head")
    found = json.loads(files["ds_config.json"])
    assert found["pipeline"] == {"activation_checkpoint_interval": 0, "use_reentrant": False}
    assert "overlap_comm" not in found["zero_optimization"]


def test_pipelines_that_recompute() -> None:
    case = made([16, 16], {"dp": 4, "recompute": Recompute.FULL})
    assert pipeline_split(case.plan)["activation_checkpoint_interval"] == 1


def test_without_a_pipeline_there_is_no_split() -> None:
    assert set(made([32], {"dp": 8}).files()) == {"ds_config.json", "launch.sh"}


@pytest.mark.parametrize(
    ("blocks", "strategy", "reason"),
    [
        ([16, 16], {"dp": 4, "zero": 2}, "ZeRO 0 or 1"),
        ([16, 16], {"tp": 2, "dp": 2}, "does not work in a pipeline"),
        ([32], {"dp": 4, "cp": 2}, "no context or expert parallelism"),
        ([32], {"dp": 8, "recompute": Recompute.SELECTIVE}, "all layers or none; the plan has selective"),
    ],
)
def test_what_deepspeed_cannot_run_is_refused(blocks: list[int], strategy: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        config(blocks, strategy)
    assert reason in caught.value.why


def test_some_recomputed_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        config([32], {"dp": 8}, full=[4])
    assert "all layers or none; the plan has full, none" in caught.value.why


def test_different_grids_are_refused() -> None:
    case = made([32], {"dp": 8})
    stage = case.plan.stages[0]
    mixed = replace(stage, strategies=(Strategy(tp=2, dp=4), *stage.strategies[1:]))
    with pytest.raises(UnsupportedError) as caught:
        deepspeed_config(replace(case.plan, stages=(mixed,)), case.model, case.job)
    assert "one parallel grid" in caught.value.why


def test_gpipe_is_refused() -> None:
    case = made([16, 16], {"dp": 4})
    plan = make_plan(Target.DEEPSPEED, [16, 16], Strategy(dp=4), case.job, microbatches=8, schedule="gpipe")
    with pytest.raises(UnsupportedError) as caught:
        deepspeed_config(plan, case.model, case.job)
    assert "gpipe" in caught.value.why


@pytest.mark.parametrize("case", deepspeed_launches(), ids=lambda case: case.name)
def test_launches_fill_their_clusters(case: Launch) -> None:
    """The plans that DeepSpeed itself checks are what they claim to be."""
    assert case.plan.strategies[0].num_devices * case.plan.pp == case.cluster.num_devices
    assert sum(stage.num_blocks for stage in case.plan.stages) == case.model.num_layers
