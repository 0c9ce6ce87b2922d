"""In which dtypes gradients and master weights are kept, and what DeepSpeed's optimizers mean for plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doctors import cluster, json_setup, model
from tests.test_cost_model import BLOCK, JOB, MODEL, make_cluster, price
from tests.tiny import tiny_model
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.cost.model import CostModel
from uniap_tune.cost.parts import DP_COMM
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.moves_deepspeed import deepspeed_moves
from uniap_tune.legality import conflict
from uniap_tune.planner import Request, build
from uniap_tune.planner import run as run_planner
from uniap_tune.render.deepspeed import deepspeed_config
from uniap_tune.space import Knobs, parse_knobs
from uniap_tune.spec import DType, Job, OptimizerName, Precision
from uniap_tune.strategy import CAPABILITIES, Target
from uniap_tune.weights import layer_parameters

WIDE = Precision(gradient_bytes=4)
TINY = Request(
    model=tiny_model(4),
    cluster=read_cluster("1x4:a100-80gb"),
    job=Job(global_batch=16, seq_length=1024),
    target=Target.DEEPSPEED,
)
ON: dict[str, Any] = {"model": model("llama-2-7b"), "cluster": cluster("1x8:h100"), "seq_length": 2048}


def costs(precision: Precision = JOB.precision, target: Target = Target.DEEPSPEED) -> CostModel:
    return CostModel(MODEL, make_cluster(), replace(JOB, precision=precision), CAPABILITIES[target])


@pytest.mark.parametrize(
    ("precision", "zero", "pp", "each"),
    [
        (Precision(), 0, 1, 2 + 2 + 12),
        (Precision(), 0, 2, 2 + 2 + 2 + 12 / 4),
        (Precision(), 1, 2, 2 + 2 + 12 / 4),
        (WIDE, 1, 1, 2 + 2 + 4 + 12 / 4),
        (WIDE, 1, 2, 2 + 2 + 4 + 12 / 4),
        (WIDE, 2, 1, 2 + 4 / 4 + 12 / 4),
        (Precision(compute=DType.FP16), 0, 2, 2 + 2 + 12),
        (Precision(compute=DType.FP32), 0, 2, 4 + 4 + 8),
        (Precision(compute=DType.FP32), 1, 1, 4 + 4 + 12 / 4),
    ],
)
def test_bytes_of_a_parameter_on_four_replicas(precision: Precision, zero: int, pp: int, each: float) -> None:
    block = price(costs(precision), dp=4, zero=zero, pp=pp)
    parameters = layer_parameters(MODEL, BLOCK)
    assert block.static == pytest.approx(each * parameters)


def test_a_pipeline_without_zero_sends_what_zero_1_does() -> None:
    plain, sharded = (price(costs(), dp=4, zero=zero, pp=2).step_s[DP_COMM] for zero in (0, 1))
    assert plain == sharded
    assert price(costs(), dp=4, zero=0, pp=1).step_s[DP_COMM] < plain  # no parameters to gather


def test_only_megatron_reduces_in_the_dtype_it_accumulates_in() -> None:
    narrow, wide = (Precision(gradient_bytes=size) for size in (2, 4))

    def seconds(precision: Precision, target: Target) -> float:
        return price(costs(precision, target), dp=4, zero=2, pp=1).step_s[DP_COMM]

    assert seconds(wide, Target.DEEPSPEED) == seconds(narrow, Target.DEEPSPEED)
    assert seconds(wide, Target.MEGATRON) > seconds(narrow, Target.MEGATRON)


def test_fp32_gradients_need_zero() -> None:
    request = replace(TINY, job=replace(TINY.job, precision=WIDE))
    plan = run_planner(request).plan
    assert plan.strategies[0].zero > 0
    lone = run_planner(replace(request, cluster=read_cluster("1x1:a100-80gb"))).plan
    assert lone.strategies[0].zero > 0


@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(fix={"zero": "0"}),
        parse_knobs([], ["zero=0"], []),
        parse_knobs(["pp=2"], [], ["zero=1"]),
    ],
)
def test_the_reason_is_named(knobs: Knobs) -> None:
    request = replace(TINY, job=replace(TINY.job, precision=WIDE), knobs=knobs)
    found = conflict(build(request)[0])
    assert found is not None
    assert any("accumulates gradients in the compute dtype" in text for text in found.reasons), found.reasons
    assert conflict(build(replace(request, job=TINY.job))[0]) is None


@pytest.mark.parametrize(("target", "stages"), [(Target.MEGATRON, {0}), (Target.DEEPSPEED, {0, 1, 2, 3})])
def test_sgd_runs_where_the_engine_takes_it(target: Target, stages: set[int]) -> None:
    job = replace(TINY.job, optimizer=OptimizerName.SGD)
    space = build(replace(TINY, target=target, job=job))[0]
    assert {strategy.zero for strategy in space.strategies(1)} == stages
    if target is Target.DEEPSPEED:
        request = replace(TINY, job=job, knobs=Knobs(fix={"zero": "2"}))
        config = deepspeed_config(run_planner(request).plan, request.model, job)
        assert config["zero_allow_untested_optimizer"] is True


def test_a_tied_embedding_in_a_pipeline_needs_its_gradients() -> None:
    job = replace(TINY.job, precision=Precision(compute=DType.FP16, gradient_bytes=4))
    tied = replace(TINY, job=job, model=replace(TINY.model, tied_embeddings=True), knobs=Knobs(fix={"pp": "2"}))
    found = conflict(build(tied)[0])
    assert found is not None
    assert any("tied embedding" in text for text in found.reasons), found.reasons
    assert conflict(build(replace(tied, knobs=Knobs(fix={"pp": "1"})))[0]) is None
    assert conflict(build(replace(tied, model=TINY.model))[0]) is None


@pytest.mark.parametrize("zero", [0, 1])
def test_zero_1_saves_gradients_even_without_replicas(zero: int) -> None:
    request = replace(TINY, knobs=Knobs(fix={"pp": "4", "zero": str(zero)}))
    strategy = run_planner(request).plan.strategies[0]
    assert (strategy.dp, strategy.zero) == (1, zero)
    held = price(costs(), dp=1, zero=zero, pp=4).static / price(costs(), dp=1, zero=0, pp=1).static
    assert held == pytest.approx((18 - 2 * zero) / 16)


def test_doctor_knows_what_deepspeed_refuses(tmp_path: Path) -> None:
    values = {"train_batch_size": 64, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    refused = json_setup(values, tmp_path / "ds.json", **ON)
    assert [name for name, _ in refused.broken] == ["gradient_dtype"]
    assert not json_setup(values | {"zero_optimization": {"stage": 1}}, tmp_path / "ds.json", **ON).broken


@pytest.mark.parametrize(("stages", "offered"), [(8, [1]), (1, [1, 2, 3])])
def test_doctor_offers_zero_where_it_changes_something(tmp_path: Path, stages: int, offered: list[int]) -> None:
    values = {"train_batch_size": 64, "bf16": {"enabled": True}}
    if stages > 1:
        values["pipeline"] = {"stages": stages}
    setup = json_setup(values, tmp_path / "ds.json", **ON, pairs={"pp": str(stages)})
    assert isinstance(setup, DeepSpeedSetup)
    assert setup.pp == stages
    assert [option.setup.zero for option in deepspeed_moves(setup) if option.setting == "zero"] == offered
