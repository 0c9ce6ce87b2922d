"""DeepSpeed's command taken apart and put together again, and how a run ends."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from uniap_tune.deepspeed import launch
from uniap_tune.deepspeed.options import Options, read_options, split_flags
from uniap_tune.errors import InputError


def command(launcher: str, script: str = "train.py --deepspeed_config ds.json", **kind: bool) -> launch.Command:
    words = shlex.split(script)
    kinds = {"is_module": False, "is_program": False} | kind
    return launch.take_apart([*shlex.split(launcher), *words], words[0], words[1:], **kinds)


def test_what_addresses_the_tuner_is_taken_out() -> None:
    found = command(
        "--autotune uniap --num_gpus 2 --autotuning=run --uniap_model gpt2 -H hosts",
        "train.py --autotuning mine --uniap_fix=tp=2 --deepspeed_config ds.json",
    )
    assert found.launcher == ("--num_gpus", "2", "-H", "hosts")
    # After the script's name everything is the script's own, except what only we can mean.
    assert found.arguments == ("--autotuning", "mine", "--deepspeed_config", "ds.json")
    assert found.flags == {"model": "gpt2", "fix": "tp=2"}
    assert shlex.split(found.text({"A": "b c"})) == ["A=b c", "deepspeed", *found.words]


@pytest.mark.parametrize(
    ("arguments", "path", "trainer"),
    [
        ("--deepspeed --deepspeed_config ds.json", "ds.json", False),
        ("--x 1 --deepspeed_config=a/ds.json --deepspeed", "a/ds.json", False),
        ("--deepspeed ds.json --bf16", "ds.json", True),
        ("--deepspeed=ds.json", "ds.json", True),
    ],
)
def test_the_json_is_found_and_replaced(arguments: str, path: str, trainer: bool) -> None:
    found = command("", f"train.py {arguments}")
    config = launch.config_argument(found.arguments)
    assert (config.path, config.trainer) == (Path(path), trainer)
    changed = launch.planned_command(found, config, Path("/x/new.json"), batch=(2, 4), recompute=False, trainer=False)
    assert " ".join(changed.arguments) == arguments.replace(path, "/x/new.json")


def test_without_a_json_it_says_how_to_give_one() -> None:
    with pytest.raises(InputError, match="no DeepSpeed JSON"):
        launch.config_argument(["--deepspeed", "--bf16"])


def test_the_trainers_arguments_agree_with_the_plan() -> None:
    found = command(
        "", "run_clm.py --deepspeed ds.json --per_device_train_batch_size 8 --gradient_checkpointing --bf16 True"
    )
    config = launch.config_argument(found.arguments)
    changed = launch.planned_command(found, config, Path("new.json"), batch=(2, 4), recompute=False, trainer=True)
    assert changed.arguments == tuple(
        shlex.split("--deepspeed new.json --bf16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 4")
    )
    again = launch.planned_command(found, config, Path("new.json"), batch=(2, 4), recompute=True, trainer=True)
    assert launch.value_of(again.arguments, "--gradient_checkpointing") == "True"


def test_the_worker_runs_the_script_or_module() -> None:
    through = launch.through_worker(command("--num_gpus 2"))
    assert through.words == shlex.split(
        "--num_gpus 2 --module uniap_tune.deepspeed.worker train.py --deepspeed_config ds.json"
    )
    module = launch.through_worker(command("--module", "pkg.train --deepspeed_config ds.json", is_module=True))
    assert module.words == shlex.split("--module uniap_tune.deepspeed.worker -m pkg.train --deepspeed_config ds.json")


def test_names_in_the_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from deepspeed.pipe import PipelineModule\n", encoding="utf-8")
    assert launch.script_mentions(command("", f"{script} x"), "PipelineModule")
    assert not launch.script_mentions(command("", f"{script} x"), "Pipeline")
    assert not launch.script_mentions(command("", f"{tmp_path / 'none.py'} x"), "PipelineModule")


@pytest.mark.parametrize(("code", "wanted"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_comes_through(code: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for DeepSpeed's launcher ends as told."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "runner.py").write_text(f"import os, sys\n{code}\n", encoding="utf-8")
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch.start(["train.py"], {}) == wanted


def test_what_a_run_leaves_behind_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    left = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"
    text = f"import subprocess\nopen('pid', 'w').write(str({left}.pid))\n"
    (package / "runner.py").write_text(text, encoding="utf-8")
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert launch.start([], {}) == 0
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not psutil.pid_exists(pid) or gone


def test_options_from_the_block_and_the_arguments() -> None:
    block = {"model": "gpt2", "seq_length": 1024, "fix": {"tp": 2}, "max_seconds": 5, "pipeline": False}
    found = read_options(block, {"seq_length": "2048", "forbid": "zero=3,zero=2", "check": "false"}, "ds.json")
    assert found == Options(
        model="gpt2",
        seq_length=2048,
        fix=("tp=2",),
        forbid=("zero=3", "zero=2"),
        max_seconds=5.0,
        pipeline=False,
        check=False,
    )
    assert found.knobs().allows("tp", 2)
    assert not found.knobs().allows("tp", 4)
    assert not found.knobs().allows("zero", 3)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("modell", "gpt2", "did you mean model?"),
        ("model", 7, "must be text"),
        ("seq_length", 0, "whole number"),
        ("seq_length", True, "whole number"),
        ("max_seconds", "soon", "number above zero"),
        ("memory_fraction", 1.5, "at most 1"),
        ("fix", 3, "an object such as"),
        ("check", "perhaps", "true or false"),
    ],
)
def test_a_wrong_option_is_named(key: str, value: object, word: str) -> None:
    with pytest.raises(InputError) as caught:
        read_options({key: value}, {}, "ds.json")
    assert f"ds.json: uniap.{key}" in caught.value.what
    assert word in str(caught.value)


def test_an_argument_without_its_value() -> None:
    assert split_flags(["a", "--uniap_model", "gpt2", "b"]) == (["a", "b"], {"model": "gpt2"})
    with pytest.raises(InputError, match="--uniap_model: the value is missing"):
        split_flags(["a", "--uniap_model"])
