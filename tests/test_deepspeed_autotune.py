"""From a ``deepspeed`` command to a plan and its files, with a stand-in for DeepSpeed's launcher."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.deepspeed import autotune, launch, resources
from uniap_tune.deepspeed.check import Case, broken_rule
from uniap_tune.errors import InfeasibleError, InputError

UNIAP = {"model": "llama-2-7b", "cluster": "2x8:h100", "seq_length": 4096, "check": False}
JSON = {
    "train_batch_size": 64,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "autotuning": {"uniap": UNIAP},
}


def parse_inclusion_exclusion(pool: Mapping[str, int], include: str, exclude: str) -> dict[str, list[int]]:
    """As DeepSpeed's, for names of whole hosts."""
    names = [name for name in pool if name != exclude and (not include or name == include)]
    if (include or exclude or next(iter(pool))) not in pool:
        raise ValueError(f"Hostname '{include or exclude}' not found in hostfile")
    return {name: list(range(pool[name])) for name in names}


def runner(hosts: Mapping[str, int] | None = None) -> Any:
    """A stand-in for ``deepspeed.launcher.runner`` with this hostfile."""
    return SimpleNamespace(fetch_hostfile=lambda _path: hosts, parse_inclusion_exclusion=parse_inclusion_exclusion)


def launcher(**changes: Any) -> Namespace:
    """What DeepSpeed's parser makes of a command."""
    given: dict[str, Any] = {
        "include": "", "exclude": "", "num_nodes": -1, "num_gpus": -1, "hostfile": "/job/hostfile",
        "module": False, "no_python": False, "autotuning": "tune",
    }  # fmt: skip
    return Namespace(**given | changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a script and its JSON."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.py").write_text("import deepspeed\n", encoding="utf-8")
    (tmp_path / "ds.json").write_text(json.dumps(JSON), encoding="utf-8")
    return tmp_path


def tune(
    words: str = "train.py --deepspeed_config ds.json",
    *,
    hosts: Mapping[str, int] | None = None,
    devices: int = 0,
    head: str = "",
    **options: Any,
) -> int:
    """``deepspeed HEAD WORDS``."""
    script, *arguments = shlex.split(words)
    parsed = launcher(user_script=script, user_args=arguments, **options)
    return autotune.run(runner(hosts), parsed, [*shlex.split(head), script, *arguments], device_count=lambda: devices)


def results(folder: Path) -> dict[str, Any]:
    """The planned JSON."""
    found: dict[str, Any] = json.loads((folder / "autotuning_results" / "ds_config_optimal.json").read_text())
    return found


def grid(folder: Path) -> dict[str, Any]:
    """The strategy of the plan's first layer."""
    plan = json.loads((folder / "autotuning_results" / "plan.json").read_text())
    found: dict[str, Any] = plan["stages"][0]["strategies"][0] | {"pp": plan["pp"]}
    return found


def test_a_plan_and_its_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune() == 0
    shown = capsys.readouterr().out
    assert shown == (folder / "autotuning_results" / "summary.txt").read_text(encoding="utf-8")
    assert "2 x 8 h100" in shown
    assert "not tried on DeepSpeed" in shown
    assert grid(folder)["dp"] == 16  # a plain script runs data parallel: no pipeline, no tensor parallelism
    after = results(folder)
    batch = after["train_micro_batch_size_per_gpu"] * after["gradient_accumulation_steps"]
    assert batch * 16 == after["train_batch_size"] == 64
    assert "autotuning" not in after
    command = (folder / "autotuning_results" / "cmd_optimal.txt").read_text(encoding="utf-8")
    path = folder / "autotuning_results" / "ds_config_optimal.json"
    assert shlex.split(command) == ["deepspeed", "train.py", "--deepspeed_config", str(path)]


def test_the_same_inputs_resume_and_others_do_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune()
    before = (folder / "autotuning_results" / "plan.json").read_bytes()
    assert "resumed" not in capsys.readouterr().out
    tune()
    assert "resumed" in capsys.readouterr().out
    assert (folder / "autotuning_results" / "plan.json").read_bytes() == before
    tune("train.py --deepspeed_config ds.json --uniap_seq_length 2048")
    assert "resumed" not in capsys.readouterr().out
    (folder / "autotuning_results" / "plan.json").write_text("{", encoding="utf-8")
    assert tune() == 0


def test_another_jobs_plan_is_kept_when_asked_for(folder: Path) -> None:
    tune()
    kept = JSON | {"autotuning": {"uniap": UNIAP | {"seq_length": 2048}, "overwrite": False}}
    (folder / "ds.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(InputError, match="has the plan of another job"):
        tune()


def test_the_results_go_where_the_json_says(folder: Path) -> None:
    elsewhere = JSON | {"autotuning": {"uniap": UNIAP, "results_dir": "elsewhere"}}
    (folder / "ds.json").write_text(json.dumps(elsewhere), encoding="utf-8")
    tune()
    assert (folder / "elsewhere" / "plan.json").exists()
    assert not (folder / "autotuning_results").exists()


def test_a_trainer_script(folder: Path) -> None:
    (folder / "ds.json").write_text(
        json.dumps({"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "uniap": UNIAP | {"model": "gpt2"}}),
        encoding="utf-8",
    )
    (folder / "run_clm.py").write_text("# mentions PipelineModule, which the Trainer does not build\n")
    words = "run_clm.py --model_name_or_path llama-2-7b --bf16 --per_device_train_batch_size 2 --deepspeed ds.json"
    assert tune(f"{words} --uniap_model llama-2-7b") == 0
    assert results(folder)["train_batch_size"] == "auto"
    command = shlex.split((folder / "autotuning_results" / "cmd_optimal.txt").read_text(encoding="utf-8"))
    counts = [int(launch.value_of(command, name) or 0) for name in autotune_arguments()]
    assert counts[0] * counts[1] * 16 == 2 * 16
    inputs = json.loads((folder / "autotuning_results" / "plan.json").read_text())["inputs"]
    assert inputs["job"]["precision"]["compute"] == "bf16"


def autotune_arguments() -> tuple[str, str]:
    return "--per_device_train_batch_size", "--gradient_accumulation_steps"


def test_a_pipeline_script_gets_its_split(folder: Path) -> None:
    (folder / "train.py").write_text("from deepspeed.pipe import PipelineModule\n", encoding="utf-8")
    assert tune("train.py --deepspeed_config ds.json --uniap_fix pp=4") == 0
    assert grid(folder)["pp"] == 4
    split = json.loads((folder / "autotuning_results" / "pipeline_split.json").read_text())
    assert split["num_stages"] == 4
    assert "activation_checkpoint_interval" in results(folder)["pipeline"]
    command = (folder / "autotuning_results" / "cmd_optimal.txt").read_text(encoding="utf-8")
    assert command.startswith("PYTHON_UNIAP_TUNE_PLAN=")
    assert "--module uniap_tune.deepspeed.worker train.py" in command
    (folder / "train.py").write_text("from uniap_tune.deepspeed import pipeline_module\n", encoding="utf-8")
    tune("train.py --deepspeed_config ds.json --uniap_fix pp=4")
    assert "worker" not in (folder / "autotuning_results" / "cmd_optimal.txt").read_text(encoding="utf-8")


def test_tensor_parallelism_needs_a_section(folder: Path) -> None:
    allowed = JSON | {"tensor_parallel": {}}
    (folder / "ds.json").write_text(json.dumps(allowed), encoding="utf-8")
    tune("train.py --deepspeed_config ds.json --uniap_fix tp=4")
    assert grid(folder)["tp"] == 4
    assert results(folder)["tensor_parallel"] == {"autotp_size": 4}
    assert "train_batch_size" not in results(folder)


@pytest.mark.parametrize(
    ("words", "change", "word"),
    [
        ("train.py --deepspeed_config ds.json", {"autotuning": {"uniap": {"cluster": "1x8:h100"}}}, "which model"),
        (
            "train.py --deepspeed_config ds.json --model_name_or_path nobody/nothing",
            {"autotuning": {"uniap": {"cluster": "1x8:h100"}}},
            "--model_name_or_path nobody/nothing",
        ),
        (
            "train.py --deepspeed_config ds.json",
            {"autotuning": {"uniap": {"cluster": "1x8:h100", "model": "gpt2"}}},
            "sequence length",
        ),
        ("train.py --deepspeed_config ds.json", {"train_batch_size": "auto"}, "global batch is not known"),
        ("train.py --deepspeed_config ds.json", {"autotuning": {"results_dir": 3, "uniap": UNIAP}}, "results_dir"),
        ("train.py --deepspeed_config ds.json", {"autotuning": 3}, "autotuning must be an object"),
        ("train.py --deepspeed", {}, "no DeepSpeed JSON"),
    ],
)
def test_what_is_missing_is_said(words: str, change: dict[str, Any], word: str, folder: Path) -> None:
    (folder / "ds.json").write_text(json.dumps(JSON | change), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        tune(words)
    assert word in str(caught.value)
    assert caught.value.fix
    assert not (folder / "autotuning_results").exists()


def test_what_does_not_fit_is_not_written(folder: Path) -> None:
    with pytest.raises(InfeasibleError) as caught:
        tune("train.py --deepspeed_config ds.json --uniap_model gpt-530b --uniap_seq_length 2048")
    assert "no pipeline: it does not mention PipelineModule" in caught.value.why
    assert caught.value.relaxations
    assert not (folder / "autotuning_results").exists()


@pytest.mark.parametrize(
    ("options", "hosts", "explicit", "environment", "shape"),
    [
        ({}, None, "4x8:h100", {}, (4, 8)),
        ({"num_gpus": 4}, None, "4x8:h100", {}, (4, 4)),
        ({"num_nodes": 2, "num_gpus": 4}, None, "4x8:h100", {}, (2, 4)),
        ({}, {"a": 8, "b": 8}, "4x8:h100", {}, (2, 8)),
        ({"num_nodes": 1}, {"a": 8, "b": 8}, "4x8:h100", {}, (1, 8)),
        ({"num_gpus": 2}, {"a": 8, "b": 4}, "4x8:h100", {}, (2, 2)),
        ({"exclude": "b"}, {"a": 8, "b": 4, "c": 8}, "4x8:h100", {}, (2, 8)),
        ({}, None, "4x8:h100", {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}, (2, 8)),
        ({}, None, "4x8:h100", {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, (4, 4)),
        ({"num_gpus": 1}, None, "4x8:h100", {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, (4, 1)),
        ({"launches": True}, None, "4x8:h100", {}, (1, 6)),
        ({"launches": True}, None, "4x8:h100", {"CUDA_VISIBLE_DEVICES": "0,3"}, (1, 2)),
        ({"launches": True, "num_gpus": 2}, None, "4x8:h100", {"CUDA_VISIBLE_DEVICES": "0"}, (1, 2)),
        ({"launches": True}, {"a": 8, "b": 8}, "4x8:h100", {}, (2, 8)),
    ],
)
def test_which_devices(
    options: dict[str, Any],
    hosts: Mapping[str, int] | None,
    explicit: str,
    environment: dict[str, str],
    shape: tuple[int, int],
) -> None:
    launches = options.pop("launches", False)
    cluster, found = resources.find_cluster(
        launcher(**options), explicit, runner(hosts), environment, device_count=lambda: 6, launches=launches
    )
    assert (found.nodes, found.devices) == shape
    assert (cluster.num_nodes, cluster.devices_per_node) == shape


@pytest.mark.parametrize(
    ("options", "hosts", "explicit", "word"),
    [
        ({}, {"a": 8, "b": 4}, "4x8:h100", "nodes with 4 and with 8 devices"),
        ({}, {"a": 16}, "4x8:h100", "1 x 16 devices"),
        ({"num_nodes": 5}, None, "4x8:h100", "5 x 8 devices"),
        ({"include": "zzz"}, {"a": 8}, "4x8:h100", "Hostname 'zzz' not found"),
        ({"include": "a", "num_gpus": 2}, {"a": 8}, "4x8:h100", "cannot be used with"),
        ({"num_nodes": 2}, None, None, "there is no hostfile"),
        ({}, None, None, "no devices to plan for"),
    ],
)
def test_devices_that_cannot_be(
    options: dict[str, Any], hosts: Mapping[str, int] | None, explicit: str | None, word: str
) -> None:
    with pytest.raises(InputError) as caught:
        resources.find_cluster(launcher(**options), explicit, runner(hosts), {}, device_count=lambda: 0, launches=False)
    assert word in str(caught.value)
    assert caught.value.fix


def test_the_driver_names_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 1 2 3 4; do echo 'NVIDIA H100 80GB HBM3'; done\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cluster, _ = resources.find_cluster(launcher(), None, runner(), {}, device_count=lambda: 4, launches=False)
    assert (cluster.num_devices, cluster.device.name) == (4, read_cluster("1x8:h100").device.name)
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA L4'\n", encoding="utf-8")
    with pytest.raises(InputError, match="devices of one kind"):
        resources.find_cluster(launcher(), None, runner(), {}, device_count=lambda: 2, launches=False)


def test_devices_that_nobody_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_QUERIES", (("no-such-smi",), ("false",), ("true",)))
    with pytest.raises(InputError) as caught:
        resources.find_cluster(launcher(), None, runner(), {}, device_count=lambda: 2, launches=False)
    for reason in ("there is no no-such-smi", "false: ", "torch sees no device"):
        assert reason in caught.value.why
    assert "--uniap_cluster" in caught.value.fix


def test_a_part_of_a_cluster_keeps_its_share_of_the_network() -> None:
    whole = read_cluster("8x8:h100")
    part = resources.part_of(whole, 2, 4)
    assert part.rails_per_node == whole.rails_per_node // 2
    assert (part.intra, part.inter, part.device) == (whole.intra, whole.inter, whole.device)
    racks = read_cluster("18x4:gb200")
    assert racks.domain_size is not None
    assert resources.part_of(racks, 18, 2).domain_size == racks.domain_size // 2
    assert resources.part_of(whole, 8, 8) is whole


MICRO = {"train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize(
    ("config", "world", "parts", "word"),
    [
        ({}, 8, (), ""),
        ({"tensor_parallel": {"autotp_size": 3}}, 8, (), "does not divide the world size 8"),
        ({}, 8, (0, 2, 4, 6), "3 pipeline stages"),
        ({"tensor_parallel": {"autotp_size": 2}}, 8, (0, 3, 6), "does not work in a pipeline"),
        ({}, 8, (0, 3, 5), "parts end at 5"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, 8, (), "offload_param needs"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}}, 8, (), ""),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, 8, (), ""),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}}, 8, (), "needs ZeRO stage 3"),
    ],
)
def test_rules_of_our_own(config: dict[str, Any], world: int, parts: tuple[int, ...], word: str) -> None:
    reason = broken_rule(Case(config=MICRO | config, world_size=world, layers=6, parts=parts))
    assert word in reason
    assert bool(reason) == bool(word)


ANYTHING = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 9) | st.sampled_from(["auto", "x", [], {}])


@given(
    zero=ANYTHING | st.dictionaries(st.sampled_from(["stage", "offload_param", "zero_hpz_partition_size"]), ANYTHING),
    tensor=ANYTHING | st.dictionaries(st.just("autotp_size"), ANYTHING),
    world=st.integers(1, 64),
)
def test_rules_take_whatever_stands_in_a_json(zero: Any, tensor: Any, world: int) -> None:
    config = {"zero_optimization": zero, "tensor_parallel": tensor}
    reason = broken_rule(Case(config=config, world_size=world, layers=6, parts=()))
    degree = tensor.get("autotp_size") if isinstance(tensor, dict) else None
    if isinstance(degree, int) and degree > 1:
        assert ("does not divide" in reason) == (world % degree > 0)
