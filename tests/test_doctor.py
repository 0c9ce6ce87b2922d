"""The diagnosis: the verdict, and single changes that are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.doctors import cluster, deepspeed, json_setup, megatron, model, recipe
from tests.test_tune import ALL
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.diagnosis import LEAST_GAIN, Diagnosis, diagnose, limit_for
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.options import options_of
from uniap_tune.doctor.reading import Given, read_setup
from uniap_tune.doctor.setup import Setup, difference
from uniap_tune.errors import InputError
from uniap_tune.planner import plan
from uniap_tune.predict import predict
from uniap_tune.render.deepspeed import deepspeed_files
from uniap_tune.space import Knobs
from uniap_tune.spec import Job
from uniap_tune.strategy import Target
from uniap_tune.units import GIB

# -- the verdict -------------------------------------------------------------------------------------------------------

# States alone exceed the memory: bytes of parameters (2), gradients (4 in Megatron, 2 in DeepSpeed), Adam (12).
TOO_LARGE: dict[str, Setup] = {
    "70B on 8 x 80 GB, not sharded": megatron("llama-3-70b", "1x8:a100-80gb"),
    "70B on 8 x 80 GB, tp 8": megatron("llama-3-70b", "1x8:a100-80gb", tp="8"),
    "70B on 8 x 80 GB, pp 8, recomputed": megatron("llama-3-70b", "1x8:a100-80gb", pp="8", recompute="full"),
    "70B on 8 x 80 GB, distributed optimizer": megatron("llama-3-70b", "1x8:h100", zero="1", recompute="full"),
    "70B on 8 x 80 GB, everything sharded": deepspeed("llama-3-70b", "1x8:h100", zero="3", recompute="full"),
    "13B on 40 GB without sharding": megatron("llama-2-13b", "1x8:a100-40gb", recompute="full"),
    "7B on 24 GB in data parallel": deepspeed("llama-2-7b", "1x8:l4", zero="0", recompute="full"),
    "7B on 8 x 24 GB, ZeRO 2": deepspeed("llama-2-7b", "1x8:l4", zero="2", mbs="1", recompute="full"),
    "175B on 64 x 80 GB in tensor parallel alone": megatron("gpt-3-175b", "8x8:a100-80gb", seq=2048, tp="8", zero="1"),
    "405B on 64 x 80 GB": megatron(
        "llama-3.1-405b",
        "8x8:h100",
        tp="8",
        pp="8",
        zero="1",
        recompute="full",
        layers="16,16,16,16,16,16,15,15",
    ),
    "Mixtral on 8 x 80 GB, experts everywhere": megatron("mixtral-8x7b", "1x8:a100-80gb", zero="1", recompute="full"),
    "7B with 131072 tokens and no recomputation": megatron(batch=8, seq=131072, tp="8"),
    "micro-batch of 64": megatron(batch=512, zero="1", mbs="64"),
    "ZeRO 0 with ZeRO 3's model": deepspeed("llama-2-13b", "1x8:a100-80gb", zero="0", recompute="full"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_cannot_fit(name: str) -> None:
    found = diagnose(TOO_LARGE[name])
    assert found.fits is False
    assert found.is_certain
    assert min(found.room_bytes) == found.room_bytes[found.fullest] < 0


def test_the_limit_is_that_of_the_device_the_cluster_file_or_the_option() -> None:
    setup = megatron(tp="2", pp="2", zero="1")
    whole, half = diagnose(setup), diagnose(setup, memory_fraction=0.5)
    device = setup.cluster.device.memory_bytes
    assert (whole.limit.memory_bytes, half.limit.memory_bytes) == (device, device / 2)
    assert whole.room_bytes[0] - half.room_bytes[0] == pytest.approx(device / 2)
    assert limit_for(setup.run()).band == pytest.approx(whole.breakdown.memory_band if whole.breakdown else 0)


def test_verdicts_within_the_error_are_said_to_be_uncertain() -> None:
    setup = megatron(tp="2", pp="2", zero="1")
    found = diagnose(setup)
    prediction = predict(setup.run())
    held, over = max(prediction.memory_bytes_per_stage), prediction.overhead_bytes
    band, device = found.limit.band, setup.cluster.device.memory_bytes
    for share, fits, certain in (
        (1 + 1.5 * band, True, True),
        (1 + 0.5 * band, True, False),
        (1 - 0.5 * band, False, False),
        (1 - 1.5 * band, False, True),
    ):
        judged = diagnose(setup, memory_fraction=(held * share + over) / device)
        assert (judged.fits, judged.is_certain) == (fits, certain), share


def test_what_the_engine_refuses_does_not_run() -> None:
    found = diagnose(megatron("llama-2-7b", pp="4", arguments={"num-layers": "30"}))
    assert found.fits is None
    assert found.breakdown is None
    assert [rule for rule, _ in found.broken] == ["layers_divide"]
    assert found.improvements
    for change in found.improvements:
        assert change.room_bytes > 0


def test_a_rule_that_does_not_decide_what_runs_is_told_beside_the_verdict() -> None:
    found = diagnose(megatron(tp="2", zero="1", sp="off", arguments={"tp-comm-overlap": True}))
    assert found.fits
    assert [rule for rule, _ in found.broken] == ["overlap_needs_sequence_parallel"]


# -- changes -----------------------------------------------------------------------------------------------------------

FITTING = {
    "sequence parallelism off": megatron(tp="4", pp="2", zero="1", sp="off"),
    "full recompute": megatron(tp="2", zero="1", recompute="full"),
    "bubble": megatron(batch=16, pp="8"),
    "uneven": megatron(pp="4", zero="1", layers="11,7,7,7"),
    "no overlap": megatron("llama-2-7b", "4x8:a100-80gb", tp="2", zero="1", overlap="off"),
    "experts": megatron("mixtral-8x7b", "8x8:h100", tp="4", pp="4", ep="8", etp="1", zero="1"),
    "deepspeed": deepspeed(zero="3", mbs="1"),
    "deepspeed pipeline": deepspeed(pp="4", mbs="1", zero="0"),
}


def check_changes(setup: Setup, found: Diagnosis) -> None:
    """Each change is legal, priced as predicted, safe, and of another setting; best first."""
    assert found.breakdown is not None
    today = found.breakdown.prediction
    by_edits = {option.edits: option for option in options_of(setup)}
    for change in found.improvements:
        option = by_edits[change.edits]
        assert option.setup.runs
        assert {name for name, _ in option.setup.broken} <= {name for name, _ in setup.broken}
        after = predict(option.setup.run())
        assert change.prediction == after
        assert change.gain == pytest.approx(1 - after.step_time_s / today.step_time_s)
        assert change.room_bytes == pytest.approx(min(found.limit.room(after)))
        assert change.title == difference(setup, option.setup) != ""
        assert (
            found.limit.surely_fits(after)
            or not found.fits
            or max(after.memory_bytes_per_stage) <= max(today.memory_bytes_per_stage)
        )
    gains = [change.gain for change in found.improvements]
    assert gains == sorted(gains, reverse=True)
    settings = [change.setting for change in found.improvements]
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("name", FITTING)
def test_changes_make_it_faster(name: str) -> None:
    setup = FITTING[name]
    found = diagnose(setup)
    assert found.fits
    assert 1 <= len(found.improvements) <= 3
    assert all(change.gain > LEAST_GAIN for change in found.improvements)
    check_changes(setup, found)


@pytest.mark.parametrize("name", FITTING)
def test_no_single_change_is_better_than_the_first(name: str) -> None:
    """Every option is tried again, one by one, without the code that ranks them."""
    setup = FITTING[name]
    found = diagnose(setup)
    assert found.breakdown is not None
    least = min(
        predict(option.setup.run()).step_time_s
        for option in options_of(setup)
        if option.setup.runs and not option.setup.broken and found.limit.surely_fits(predict(option.setup.run()))
    )
    assert found.improvements[0].prediction.step_time_s <= least


def test_changes_that_make_it_fit_cost_least() -> None:
    setup = megatron("llama-2-13b", "1x8:a100-80gb", tp="2", pp="1", zero="0", mbs="2")
    found = diagnose(setup)
    assert found.fits is False
    assert found.nearest is None
    assert found.improvements
    check_changes(setup, found)
    assert all(found.limit.surely_fits(change.prediction) for change in found.improvements)


def test_two_changes_where_one_is_not_enough() -> None:
    found = diagnose(megatron("llama-2-13b", "1x8:a100-40gb", zero="1", mbs="4"))
    assert found.nearest is not None
    assert found.nearest.room_bytes < 0
    assert found.improvements
    for change in found.improvements:
        assert " and " in change.setting
        assert found.limit.surely_fits(change.prediction)
        names = [edit.split()[0] for edit in change.edits]
        assert len(set(names)) == len(names)


def test_a_good_configuration_is_left_alone() -> None:
    """The optimum of the search over the same settings has no better neighbour in it."""
    where = cluster("1x8:a100-80gb")
    best = plan(model("llama-2-7b"), where, Job(global_batch=128, seq_length=4096))
    grid = best.strategies[0]
    setup = megatron(
        tp=str(grid.tp), pp=str(best.pp), zero=str(grid.zero), mbs=str(best.micro_batch_size),
        recompute=str(grid.recompute),
    )  # fmt: skip
    assert all(change.gain < 0.02 for change in diagnose(setup, shown=99).improvements)


def test_the_shorter_list_is_the_beginning_of_the_longer() -> None:
    setup = FITTING["sequence parallelism off"]
    short, long = (diagnose(setup, shown=count).improvements for count in (2, 9))
    assert len(short) == 2
    assert long[:2] == short


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_format_is_diagnosed(name: str) -> None:
    setup = recipe(name, "8x8:h100")
    found = diagnose(setup)
    assert found.fits is not None or found.broken
    if found.fits is not None and found.nearest is None:
        check_changes(setup, found)


def test_settings_are_priced_as_the_plan_that_has_them(tmp_path: Path) -> None:
    """A plan.json, and the same settings given one by one."""
    where, job = cluster("2x8:a100-40gb"), Job(global_batch=64, seq_length=4096)
    made = plan(model("llama-2-13b"), where, job, target=Target.MEGATRON)
    path = tmp_path / "plan.json"
    path.write_text(made.to_json(), encoding="utf-8")
    setup = read_setup(str(path), Given())
    assert isinstance(setup, MegatronSetup)
    found = diagnose(setup)
    assert found.fits
    assert found.breakdown is not None
    limit = max(found.breakdown.prediction.memory_bytes_per_stage)
    assert limit == pytest.approx(made.peak_memory_bytes - found.breakdown.prediction.overhead_bytes, rel=0.05)
    assert found.breakdown.prediction.step_time_s == pytest.approx(made.step_time_s, rel=0.05)
    other = read_setup(str(path), Given(cluster=cluster("2x8:h100")))
    assert other.cluster.device.name != setup.cluster.device.name


def test_a_deepspeed_plan(tmp_path: Path) -> None:
    made = plan(
        model("llama-2-7b"), cluster("1x8:a100-40gb"), Job(global_batch=64, seq_length=2048), target=Target.DEEPSPEED
    )
    path = tmp_path / "plan.json"
    path.write_text(made.to_json(), encoding="utf-8")
    setup = read_setup(str(path), Given())
    assert isinstance(setup, DeepSpeedSetup)
    found = diagnose(setup)
    assert found.fits
    assert found.breakdown is not None
    assert found.breakdown.prediction.step_time_s == pytest.approx(made.step_time_s, rel=0.05)


def test_a_split_beside_the_json_is_the_pipeline(tmp_path: Path) -> None:
    """The files that ``plan`` writes for a pipeline say the same as its plan.json."""
    name, where = model("llama-2-7b"), cluster("1x8:a100-40gb")
    made = plan(
        name, where, Job(global_batch=64, seq_length=2048), target=Target.DEEPSPEED, knobs=Knobs(fix={"pp": "4"})
    )
    files = deepspeed_files(made, name, where, Job(global_batch=64, seq_length=2048), "test")
    for file, text in (files | {"plan.json": made.to_json()}).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    given = Given(cluster=where, model=name, seq_length=2048)
    both = [
        diagnose(read_setup(str(tmp_path / file), what))
        for file, what in (("ds_config.json", given), ("plan.json", Given()))
    ]
    assert both[0].breakdown == both[1].breakdown
    assert "pipeline_split.json" in " ".join(both[0].setup.notes)
    assert both[0].setup.settings["pp"] == "4"


JOB: dict[str, Any] = {"cluster": cluster("1x8:a100-80gb"), "model": model("llama-2-7b"), "seq_length": 2048}


def test_a_deepspeed_json_says_batches_zero_and_precision(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 64, "gradient_accumulation_steps": 2, "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 1},
    }  # fmt: skip
    setup = json_setup(values, tmp_path / "ds.json", **JOB)
    assert isinstance(setup, DeepSpeedSetup)
    assert (setup.job.global_batch, setup.micro_batch, setup.microbatches, setup.zero) == (64, 4, 2, 3)
    assert str(setup.job.precision.compute) == "fp16"
    assert "recompute=full" in " ".join(setup.notes)
    full = json_setup(values, tmp_path / "ds.json", **JOB, pairs={"recompute": "full"})
    assert predict(full.run()).peak_memory_bytes < predict(setup.run()).peak_memory_bytes


@pytest.mark.parametrize(
    ("stage", "more", "gradients"),
    [(1, {}, 0), (2, {}, 4 / 8), (3, {}, 2 / 8), (2, {"data_types": {"grad_accum_dtype": "fp32"}}, -4 / 8)],
)
def test_offloaded_states_take_no_memory(stage: int, more: dict[str, Any], gradients: float, tmp_path: Path) -> None:
    zero = {"stage": stage, "overlap_comm": True}
    plain, offloaded = (
        json_setup(
            {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": section} | more,
            tmp_path / "d.json",
            **JOB,
        )
        for section in (zero, {**zero, "offload_optimizer": {"device": "cpu"}})
    )
    parameters = 6.738e9
    saved = predict(plain.run()).steady_memory_bytes - predict(offloaded.run()).steady_memory_bytes
    # master weights and two moments, the fp32 copy of the gradients that the optimizer reads where they are none, and
    # from ZeRO-2 on the gradients, which ZeRO-2 joins first
    assert saved == pytest.approx(((12 + 4) / 8 + gradients) * parameters, rel=0.002)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"train_batch_size": 60, "train_micro_batch_size_per_gpu": 4}, "batch_divides"),
        ({"train_batch_size": 64, "pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}}, "zero_in_pipeline"),
        ({"train_batch_size": 64, "tensor_parallel": {"autotp_size": 3}}, "deepspeed_rule"),
        (
            {"train_batch_size": 64, "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "deepspeed_rule",
        ),
        ({"train_batch_size": 64, "zero_optimization": {"stage": 1}, "optimizer": {"type": "SGD"}}, "deepspeed_rule"),
        ({"train_batch_size": 64, "zero_optimization": {"stage": 5}}, "zero_stage"),
        ({"train_batch_size": 64, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "precision"),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8},
            "batch_product",
        ),
    ],
)
def test_what_deepspeed_refuses(values: dict[str, Any], rule: str, tmp_path: Path) -> None:
    found = diagnose(json_setup(values, tmp_path / "ds.json", **JOB))
    assert found.fits is None
    assert [name for name, _ in found.broken] == [rule]


def test_an_old_way_to_write_zero_1_is_edited(tmp_path: Path) -> None:
    values = {"train_batch_size": 64, "zero_optimization": True, "bf16": {"enabled": True}}
    setup = json_setup(values, tmp_path / "ds.json", **JOB)
    assert isinstance(setup, DeepSpeedSetup)
    other = setup.with_stage(2).setup
    assert isinstance(other, DeepSpeedSetup)
    assert (setup.zero, other.zero) == (1, 2)


def test_other_stages_keep_the_batch(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 64,
        "bf16": {"enabled": True}, "pipeline": {"stages": 8},
    }  # fmt: skip
    setup = json_setup(values, tmp_path / "ds.json", **JOB)
    assert isinstance(setup, DeepSpeedSetup)
    option = setup.with_stages(2)
    assert option.edits == ("PipelineModule(num_stages=2)", "gradient_accumulation_steps = 16")
    assert not option.setup.broken


def test_partial_offloading_goes_with_zero_3(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    setup = json_setup({"train_batch_size": 64, "zero_optimization": zero}, tmp_path / "ds.json", **JOB)
    assert isinstance(setup, DeepSpeedSetup)
    assert "without zero_optimization.offload_optimizer.ratio" in setup.with_stage(2).edits


def test_buckets_are_those_of_the_file(tmp_path: Path) -> None:
    used = []
    for size in (10**6, 5 * 10**8, None):
        zero = {"stage": 1, "overlap_comm": True} | ({"reduce_bucket_size": size} if size else {})
        values = {"train_batch_size": 64, "bf16": {"enabled": True}, "zero_optimization": zero}
        used.append(predict(json_setup(values, tmp_path / "ds.json", **JOB).run()).steady_memory_bytes)
    assert used[1] - used[0] == pytest.approx(2 * 2 * (5 * 10**8 - 10**6))
    assert used[2] == used[1]


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ({"tp": "3"}, "is not the 8 devices"),
        ({"tp": "2", "dp": "8"}, "is not the 8 devices"),
        ({"tq": "2"}, "no such setting"),
        ({"tp": "x"}, "must be a whole number"),
        ({"zero": "4"}, "must be a whole number"),
        ({"sp": "yes"}, "must be on or off"),
        ({"recompute": "some"}, "must be none, selective, full or a number"),
        ({"pp": "2", "layers": "20,20"}, "add up to 32"),
        ({"ep": "2"}, "has no experts"),
    ],
)
def test_settings_that_make_no_sense(pairs: dict[str, str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        megatron(**pairs)


@pytest.mark.parametrize("pairs", [{"cp": "2"}, {"vpp": "2", "pp": "2"}, {"sp": "on"}, {"recompute": "selective"}])
def test_settings_that_deepspeed_does_not_have(pairs: dict[str, str]) -> None:
    with pytest.raises(InputError, match="DeepSpeed"):
        deepspeed(**pairs)


def test_memory_of_a_stage_is_what_adds_up() -> None:
    """ZeRO 1 on 8 ranks: 2 + 4 + 12/8 bytes a parameter, over the two tensor-parallel ranks."""
    found = diagnose(megatron(tp="2", zero="1"))
    assert found.breakdown is not None
    (stage,) = found.breakdown.memory
    parameters = stage["parameters"] / 2
    assert stage["gradients"] == pytest.approx(4 * parameters)
    assert stage["optimizer_states"] == pytest.approx(12 * parameters / 4)
    assert parameters == pytest.approx(6.74e9 / 2, rel=0.02)
    assert sum(stage.values()) > 20 * GIB


def test_the_worth_of_overlapping_tensor_parallelism_is_predicted() -> None:
    exposed = megatron("llama-2-7b", "1x8:h100", tp="8", arguments={"tp-comm-overlap": None})
    finding = next(f for f in diagnose(exposed).findings if f.name == "tensor_communication_exposed")
    assert finding.edits == ("--tp-comm-overlap",)
    assert finding.lost_s is not None
    assert finding.lost_s > 0
    fixed = megatron("llama-2-7b", "1x8:h100", tp="8")
    assert "tensor_communication_exposed" not in {f.name for f in diagnose(fixed).findings}
    gained = predict(exposed.run()).step_time_s - predict(fixed.run()).step_time_s
    assert finding.lost_s == pytest.approx(gained)
