"""The user's DeepSpeed JSON: what is read from it, what a plan changes in it, and the diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uniap_tune.adapters import deepspeed as ds
from uniap_tune.errors import InputError
from uniap_tune.spec import DType, OptimizerName

PLANNED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000},
}


def planned(**changes: Any) -> dict[str, Any]:
    return PLANNED | changes


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"b": 1, "a": {"c": 5e8}}', encoding="utf-8")
    assert list(ds.read_config(path)) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[1]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": "\udcff"}', "not JSON"),
    ],
)
def test_a_damaged_file_is_named(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        ds.read_config(path)
    assert "ds.json" in caught.value.what
    assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        ds.read_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("values", "world", "batch"),
    [
        ({"train_batch_size": 64}, 8, 64),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 8, 64),
        ({"train_micro_batch_size_per_gpu": 2}, 8, 16),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, 8, None),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}, 8, None),
        ({}, 8, None),
        # Four replicas read different samples; DeepSpeed counts eight.
        ({"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}, 8, 8),
        ({"train_batch_size": 16, "tensor_parallel": {"autotp_size": 2}}, 8, 8),
        ({"train_batch_size": 16, "tensor_parallel": {"autotp_size": 0}}, 8, 16),
    ],
)
def test_global_batch(values: dict[str, Any], world: int, batch: int | None) -> None:
    assert ds.global_batch(values, "ds.json", world) == batch


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", [8]])
def test_a_wrong_batch_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"ds\.json: train_batch_size"):
        ds.global_batch({"train_batch_size": value}, "ds.json", 8)


def test_precision_and_optimizer() -> None:
    where = "ds.json"
    bf16 = ds.precision({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, where)
    assert bf16 is not None
    assert (bf16.compute, bf16.gradient_bytes) == (DType.BF16, 4)
    fp16 = ds.precision({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, where)
    assert fp16 is not None
    assert fp16.compute is DType.FP16
    plain = ds.precision({}, where)
    assert plain is not None
    assert plain.compute is DType.FP32
    assert ds.precision({"bf16": {"enabled": "auto"}}, where) is None
    assert ds.optimizer({}, where) is OptimizerName.ADAM
    assert ds.optimizer({"optimizer": {"type": "SGD"}}, where) is OptimizerName.SGD
    with pytest.raises(InputError, match=r'optimizer\.type "Adagrad"'):
        ds.optimizer({"optimizer": {"type": "Adagrad"}}, where)
    with pytest.raises(InputError, match="zero_optimization must be an object"):
        ds.section({"zero_optimization": 3}, "zero_optimization", where)


def test_only_what_the_plan_decides_is_changed() -> None:
    user = {
        "train_batch_size": 64,
        "fp16": {"enabled": True, "loss_scale": 0},
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5e8, "reduce_bucket_size": 7, "a": 9},
        "autotuning": {"enabled": False},
        "uniap": {"model": "gpt2"},
        "my_own": {"x": None},
    }  # fmt: skip
    after = ds.rewrite(user, PLANNED)
    assert after == {
        "train_batch_size": 64,
        "fp16": {"enabled": True, "loss_scale": 0},
        "gradient_clipping": 0.3,
        "zero_optimization": {
            "stage": 2,
            "stage3_max_live_parameters": 5e8,
            "reduce_bucket_size": 7,
            "a": 9,
            "contiguous_gradients": True,
        },
        "my_own": {"x": None},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
    }
    assert [str(change) for change in ds.differences(user, after)] == [
        "~ zero_optimization.stage: 3 -> 2",
        "+ zero_optimization.contiguous_gradients: true",
        '- autotuning: {"enabled": false}',
        '- uniap: {"model": "gpt2"}',
        "+ train_micro_batch_size_per_gpu: 2",
        "+ gradient_accumulation_steps: 4",
    ]


@pytest.mark.parametrize("stage", range(4))
def test_keys_of_other_stages_go(stage: int) -> None:
    zero = {
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
        "zero_hpz_partition_size": 8,
        "compute_grad_norm": False,
    }
    after = ds.rewrite({"zero_optimization": zero}, planned(zero_optimization={"stage": stage}))["zero_optimization"]
    assert after.pop("stage") == stage
    assert (
        set(after)
        == {
            0: set(),
            1: {"offload_optimizer", "compute_grad_norm"},
            2: {"offload_optimizer", "compute_grad_norm"},
            3: {"offload_optimizer", "offload_param", "zero_hpz_partition_size"},
        }[stage]
    )
    if stage:
        assert ("ratio" in after["offload_optimizer"]) == (stage == 3)


def test_an_old_way_to_write_zero() -> None:
    assert ds.rewrite({"zero_optimization": True}, PLANNED)["zero_optimization"] == PLANNED["zero_optimization"]


def test_tensor_parallelism_leaves_the_sum_out() -> None:
    tensor = {key: value for key, value in PLANNED.items() if key != "train_batch_size"}
    tensor["tensor_parallel"] = {"autotp_size": 2}
    after = ds.rewrite({"train_batch_size": 64, "tensor_parallel": {"preset_model": "llama"}}, tensor)
    assert "train_batch_size" not in after
    assert after["tensor_parallel"] == {"preset_model": "llama", "autotp_size": 2}
    back = ds.rewrite({"tensor_parallel": {"autotp_size": 4}}, PLANNED)
    assert back["tensor_parallel"] == {"autotp_size": 0}


def test_the_trainers_autos_stay() -> None:
    user = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    after = ds.rewrite(user, PLANNED, trainer=True)
    assert after["train_batch_size"] == "auto"
    assert after["train_micro_batch_size_per_gpu"] == 2
    assert after["gradient_accumulation_steps"] == "auto"
    assert after["zero_optimization"]["reduce_bucket_size"] == "auto"
    plain = ds.rewrite(user, PLANNED)
    assert plain["train_batch_size"] == 64
    assert plain["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_a_pipelines_interval() -> None:
    pipeline = {"activation_checkpoint_interval": 1, "use_reentrant": False}
    after = ds.rewrite({"pipeline": {"pipe_partitioned": True}}, planned(pipeline=pipeline))
    assert after["pipeline"] == {"pipe_partitioned": True} | pipeline
    assert ds.rewrite({"pipeline": "auto"}, planned(pipeline=pipeline))["pipeline"] == pipeline


@pytest.mark.parametrize(("kind", "said"), [("SGD", True), ("Lamb", True), ("AdamW", None)])
def test_zero_is_told_to_take_untested_optimizers(kind: str, said: bool | None) -> None:
    after = ds.rewrite({"optimizer": {"type": kind}}, PLANNED)
    assert after.get("zero_allow_untested_optimizer") is said


def test_buckets_larger_than_the_plan_counts_go() -> None:
    after = ds.rewrite({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, PLANNED)
    assert after["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_forbidden_stages() -> None:
    assert ds.forbidden_zero({"optimizer": {"type": "OneBitAdam"}}) == {1, 2, 3}
    assert ds.forbidden_zero({}) == frozenset()
    assert ds.forbidden_zero({"gradient_allreduce_op": "sum"}) == {3}
    assert ds.forbidden_zero({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}) == {0}
    assert ds.forbidden_zero({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}) == {0}


def test_a_number_that_became_another_type_is_a_change() -> None:
    changes = ds.differences({"a": 1, "b": {"c": 2}}, {"a": True, "b": {"c": 2}})
    assert [change.key for change in changes] == ["a"]
    assert json.loads(changes[0].after or "") is True
