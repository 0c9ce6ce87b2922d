"""Launch files as files: valid shell, stable bytes, golden examples, and scripts that really start something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.launches import Launch, deepspeed_launches, launch, megatron_launches
from uniap_tune import __version__
from uniap_tune.adapters.recipes import read_recipe
from uniap_tune.deepspeed.pipeline import read_split
from uniap_tune.files import write_files
from uniap_tune.render import EXECUTABLE
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Target

GOLDEN = Path(__file__).parent / "golden" / "render"
LAUNCHES = [*megatron_launches(), *deepspeed_launches()]
NAMES = [f"{made.plan.target}-{made.name}" for made in LAUNCHES]

# Stands in for torchrun and deepspeed: one JSON object with its arguments and what it sees of the environment.
RECORDER = """#!/usr/bin/env python3
import json, os, sys
seen = {"connections": "CUDA_DEVICE_MAX_CONNECTIONS", "split": "PYTHON_UNIAP_TUNE_PLAN"}
print(json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(variable) for name, variable in seen.items()}}))
"""


@pytest.mark.parametrize("made", LAUNCHES, ids=NAMES)
def test_scripts_are_valid_shell(made: Launch, tmp_path: Path) -> None:
    script = tmp_path / "launch.sh"
    script.write_text(made.files()["launch.sh"])
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{index}.sh" for index in range(len(LAUNCHES))]
    for made, script in zip(LAUNCHES, scripts, strict=True):
        script.write_text(made.files()["launch.sh"])
    run = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("made", LAUNCHES, ids=NAMES)
def test_the_same_bytes_twice(made: Launch) -> None:
    files = made.files()
    assert files == made.files()
    for text in files.values():
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert not any(line != line.rstrip() for line in text.splitlines())


GOLDEN_LAUNCHES = {
    "megatron-uneven-recompute": launch(
        "llama-2-7b", "1x8:a100-80gb", [7, 9, 9, 7], {"tp": 2}, full=[3, 3, 3, 3], micro_batch=2
    ),
    "megatron-layout-multi-node": launch(
        "llama-3-70b", "8x8:h100", [18, 20, 21, 21], {"tp": 8, "dp": 2, "zero": 1}, seq_length=8192, microbatches=64
    ),
    "megatron-fsdp": launch("llama-3.2-1b", "1x8:h100", [16], {"dp": 8, "zero": 3}),
    "deepspeed-zero3-tensor": launch(
        "llama-3-8b",
        "2x8:a100-80gb",
        [32],
        {"tp": 2, "dp": 8, "zero": 3, "recompute": Recompute.FULL},
        target=Target.DEEPSPEED,
    ),
    "deepspeed-pipeline": launch("gpt2", "1x4:l4", [3, 5, 4], {}, target=Target.DEEPSPEED, seq_length=1024),
}


@pytest.mark.parametrize("name", GOLDEN_LAUNCHES)
def test_golden(name: str) -> None:
    """UNIAP_TUNE_WRITE_GOLDEN=1 writes the examples anew: read the difference before committing it."""
    files = {file: text.replace(__version__, "VERSION") for file, text in GOLDEN_LAUNCHES[name].files().items()}
    if os.environ.get("UNIAP_TUNE_WRITE_GOLDEN"):
        write_files(GOLDEN / name, files, force=True, executable=EXECUTABLE)
    found = {path.name: path.read_text(encoding="utf-8") for path in (GOLDEN / name).iterdir()}
    assert files == found


def start(made: Launch, folder: Path, *extra: str, **environment: str) -> dict[str, object]:
    """Run a launch script with recorders in the place of the launchers."""
    tools = folder / "tools"
    write_files(tools, {"torchrun": RECORDER, "deepspeed": RECORDER}, executable=("torchrun", "deepspeed"))
    write_files(folder / "Megatron-LM", {"pretrain_gpt.py": ""})
    write_files(folder / "out", made.files(), executable=EXECUTABLE)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [str(folder / "out" / "launch.sh"), *extra],
        env={"PATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "user"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answer: dict[str, object] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("name", [name for name in GOLDEN_LAUNCHES if name.startswith("megatron")])
def test_the_megatron_script_passes_what_the_mapping_says(name: str, tmp_path: Path) -> None:
    made = GOLDEN_LAUNCHES[name]
    document = yaml.safe_load(made.files()["megatron_args.yaml"])
    expected = []
    for argument, value in document["MODEL_ARGS"].items():
        expected += [argument] if value is True else [argument, str(value)]
    answer = start(made, tmp_path, "--seed", "7", MASTER_ADDR="node0", NODE_RANK="3")
    argv = answer["argv"]
    assert isinstance(argv, list)
    begin = argv.index("Megatron-LM/pretrain_gpt.py")
    assert argv[:begin] == [
        *("--nproc-per-node", str(made.cluster.devices_per_node), "--nnodes", str(made.cluster.num_nodes)),
        *("--node-rank", "3", "--master-addr", "node0", "--master-port", "29500"),
    ]
    assert argv[begin + 1 :] == [*expected, "--seed", "7"]
    fsdp = "--use-megatron-fsdp" in document["MODEL_ARGS"]
    assert answer["connections"] == (None if fsdp else document["ENV_VARS"]["CUDA_DEVICE_MAX_CONNECTIONS"])


@pytest.mark.parametrize("name", [name for name in GOLDEN_LAUNCHES if name.startswith("megatron")])
def test_our_scripts_can_be_tuned_again(name: str, tmp_path: Path) -> None:
    """The reader of other people's scripts finds in ours what was written, without running it."""
    made = GOLDEN_LAUNCHES[name]
    write_files(tmp_path, made.files())
    recipe = read_recipe(str(tmp_path / "launch.sh"))
    document = yaml.safe_load(made.files()["megatron_args.yaml"])
    expected = {argument: value if value is True else str(value) for argument, value in document["MODEL_ARGS"].items()}
    assert {f"--{argument}": found.value for argument, found in recipe.arguments.items()} == expected
    assert document["ENV_VARS"].items() <= recipe.environment.items()
    assert (recipe.hints.num_nodes, recipe.hints.devices_per_node) == (
        made.cluster.num_nodes,
        made.cluster.devices_per_node,
    )


def test_megatron_data_and_tokenizer_come_from_the_environment(tmp_path: Path) -> None:
    answer = start(
        GOLDEN_LAUNCHES["megatron-fsdp"],
        tmp_path,
        DATA_PATH="0.3 /data/a b 0.7 /data/$(touch hacked)",
        TOKENIZER_MODEL="/my tokenizer",
        CHECKPOINT_DIR="/my checkpoints",
        LR="1e-5",
    )
    argv = answer["argv"]
    assert isinstance(argv, list)
    begin = argv.index("--data-path")
    assert argv[begin:] == [
        *("--data-path", "0.3", "/data/a", "b", "0.7", "/data/$(touch", "hacked)", "--split", "99,1,0"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/my tokenizer"),
        *("--load", "/my checkpoints", "--save", "/my checkpoints", "--save-interval", "1000"),
    ]
    assert argv[argv.index("--lr") + 1] == "1e-5"
    assert not (tmp_path / "hacked").exists()


def test_without_megatron_the_script_says_so(tmp_path: Path) -> None:
    write_files(tmp_path, GOLDEN_LAUNCHES["megatron-fsdp"].files(), executable=EXECUTABLE)
    run = subprocess.run([tmp_path / "launch.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "set MEGATRON_PATH" in run.stderr


def test_several_nodes_need_the_first_one_named(tmp_path: Path) -> None:
    write_files(tmp_path / "Megatron-LM", {"pretrain_gpt.py": ""})
    made = GOLDEN_LAUNCHES["megatron-layout-multi-node"]
    write_files(tmp_path / "out", made.files(), executable=EXECUTABLE)
    run = subprocess.run(
        [tmp_path / "out" / "launch.sh"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "set MASTER_ADDR" in run.stderr


def test_the_deepspeed_script_starts_both_kinds_of_training_script(tmp_path: Path) -> None:
    made = GOLDEN_LAUNCHES["deepspeed-zero3-tensor"]
    config = str(tmp_path / "a" / "out" / "ds_config.json")
    answer = start(made, tmp_path / "a", "--epochs", "1", TRAIN_SCRIPT="my train.py", HOSTFILE="hosts")
    assert answer["argv"] == [
        *("--num_gpus", "8", "--num_nodes", "2", "--hostfile", "hosts", "--master_port", "29500", "my train.py"),
        *("--deepspeed", "--deepspeed_config", config, "--epochs", "1"),
    ]
    config = str(tmp_path / "b" / "out" / "ds_config.json")
    answer = start(made, tmp_path / "b", TRAIN_SCRIPT="t.py", SCRIPT_STYLE="trainer", MASTER_ADDR="node0")
    assert answer["argv"] == [
        *("--num_gpus", "8", "--num_nodes", "2", "--hostfile", "/job/hostfile"),
        *("--master_addr", "node0", "--master_port", "29500", "t.py", "--deepspeed", config),
        *("--per_device_train_batch_size=1", "--gradient_accumulation_steps=8", "--max_grad_norm=1.0"),
        *("--bf16", "--gradient_checkpointing"),
    ]


def test_the_deepspeed_script_names_the_split_to_the_training_script(tmp_path: Path) -> None:
    answer = start(GOLDEN_LAUNCHES["deepspeed-pipeline"], tmp_path, TRAIN_SCRIPT="t.py")
    assert answer["split"] == str(tmp_path / "out" / "pipeline_split.json")
    assert read_split(Path(str(answer["split"]))).parts == (0, 4, 9, 14)


def test_the_deepspeed_script_refuses_an_unknown_style(tmp_path: Path) -> None:
    write_files(tmp_path, GOLDEN_LAUNCHES["deepspeed-pipeline"].files(), executable=EXECUTABLE)
    run = subprocess.run(
        [tmp_path / "launch.sh"],
        env={"PATH": os.environ["PATH"], "TRAIN_SCRIPT": "t.py", "SCRIPT_STYLE": "both"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "SCRIPT_STYLE is 'both'" in run.stderr


@pytest.mark.parametrize("target", [Target.MEGATRON, Target.DEEPSPEED])
def test_names_from_inputs_are_never_executed(target: Target, tmp_path: Path) -> None:
    made = launch("llama-2-7b", "1x8:h100", [32], {"dp": 8}, target=target)
    evil = "x\ntouch hacked\n$(touch hacked) `touch hacked` \x1b[31m"
    plan = replace(made.plan, inputs={"hash": evil})
    named = replace(made, plan=plan, model=replace(made.model, name=evil), cluster=replace(made.cluster, name=evil))
    start(named, tmp_path, TRAIN_SCRIPT="t.py")
    assert not list(tmp_path.rglob("hacked"))
    for text in named.files().values():
        assert "\x1b" not in text
