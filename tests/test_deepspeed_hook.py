"""The hook in a stand-in for DeepSpeed's launcher, the line that installs it, and the split of a pipeline's layers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uniap_tune.deepspeed import activation, hook
from uniap_tune.deepspeed.pipeline import PLAN_VARIABLE, Split, checkpointing, place, read_split
from uniap_tune.errors import InputError

LAUNCHER = """
import argparse
called = []
def parse_args(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--autotuning", default="", choices=["tune", "run"])
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    return parser.parse_args(args)
def fetch_hostfile(path): ...
def parse_inclusion_exclusion(*args): ...
def get_accelerator(): ...
def main(args=None):
    called.append(vars(parse_args(args)))
"""


@pytest.fixture
def runner() -> Any:
    """A launcher as the hook knows it."""
    module = ModuleType("deepspeed.launcher.runner")
    exec(LAUNCHER, module.__dict__)
    return module


def test_a_plain_command_goes_on_as_before(runner: Any) -> None:
    assert hook.patch(runner)
    runner.main(["train.py", "--autotune", "uniap"])
    assert runner.called[0]["user_args"] == ["--autotune", "uniap"]
    runner.main(["--autotuning", "tune", "train.py"])
    assert runner.called[1]["autotuning"] == "tune"
    assert hook.patch(runner)  # once is enough
    assert runner.argparse.Namespace is argparse.Namespace


@pytest.mark.parametrize("by_json", [False, True])
def test_it_takes_over_when_asked(by_json: bool, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def tune(_runner: Any, options: Any, words: Any) -> int:
        seen.append((options.autotuning, words))
        return 3

    monkeypatch.setattr(hook, "_tune", tune)
    config = tmp_path / "ds.json"
    tuning = {"tuner_type": "uniap"} if by_json else {}
    config.write_text(json.dumps({"autotuning": tuning}), encoding="utf-8")
    hook.patch(runner)
    asked = ["--autotuning", "run"] if by_json else ["--autotune", "uniap"]
    words = [*asked, "train.py", "--deepspeed_config", str(config)]
    with pytest.raises(SystemExit) as left:
        runner.main(words)
    assert left.value.code == 3
    assert seen == [("run" if by_json else "tune", words)]
    assert runner.called == []


def test_an_error_is_a_message_and_a_code(
    runner: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tune(*_args: Any) -> int:
        raise InputError("what", why="why", fix="fix")

    monkeypatch.setattr(hook, "_tune", tune)
    hook.patch(runner)
    with pytest.raises(SystemExit) as left:
        runner.main(["--autotune", "uniap", "train.py"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: what\n  why: why\n  fix: fix\n"


def test_an_unknown_launcher_is_left_alone_with_one_line(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    del runner.fetch_hostfile
    before = dict(vars(runner))
    assert not hook.patch(runner)
    assert vars(runner) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "has no fetch_hostfile" in lines[0]


def test_a_launcher_without_autotuning_says_so(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exec(LAUNCHER.replace('parser.add_argument("--autotuning", default="", choices=["tune", "run"])', ""), vars(runner))
    hook.patch(runner)
    runner.main(["train.py"])
    assert runner.called == [{"user_script": "train.py", "user_args": []}]
    assert "has no --autotuning" in capsys.readouterr().err


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, with the record of this one."""
    info = tmp_path / "uniap_tune-0.1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("uniap_tune/__init__.py,sha256=abc,1\n", encoding="utf-8")
    monkeypatch.setattr(activation, "_folders", lambda: [tmp_path])
    monkeypatch.setattr(activation, "_record", lambda: info / "RECORD")
    return tmp_path


def test_enabled_and_disabled_again_nothing_is_left(places: Path) -> None:
    record = places / "uniap_tune-0.1.0.dist-info" / "RECORD"
    before = record.read_text(encoding="utf-8")
    assert not activation.status()[0].enabled
    path = activation.enable()
    assert activation.status() == [activation.Status(path, True, True)]
    assert record.read_text(encoding="utf-8") == before + f"{activation.FILE},,\n"
    activation.enable()
    assert record.read_text(encoding="utf-8").count(activation.FILE) == 1
    path.write_text("import sys\n", encoding="utf-8")
    assert not activation.status()[0].current
    assert activation.disable() == [path]
    assert record.read_text(encoding="utf-8") == before
    assert sorted(item.name for item in places.iterdir()) == ["uniap_tune-0.1.0.dist-info"]
    assert activation.disable() == []


def test_without_a_place_to_write_it_says_so(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_folders", lambda: [places / "none"])
    with pytest.raises(InputError, match="no folder that Python reads"):
        activation.enable()


@pytest.mark.parametrize(
    ("words", "installs"),
    [
        (["-c", "LOOK"], False),
        (["-c", "LOOK", "--autotune", "uniap"], False),
        (["deepspeed", "--num_gpus", "2", "train.py"], False),
        (["deepspeed", "--autotune", "uniap", "train.py"], True),
        (["deepspeed", "--autotuning=run", "train.py"], True),
        (["-u", "deepspeed", "--autotuning", "run", "train.py"], True),
        (["train.py", "deepspeed"], False),
    ],
)
def test_the_line_acts_on_deepspeeds_command_alone(words: list[str], installs: bool, tmp_path: Path) -> None:
    (tmp_path / activation.FILE).write_text(activation.LINE, encoding="utf-8")
    look = "import sys; print('uniap_tune.deepspeed.hook' in sys.modules)"
    for name in ("deepspeed", "train.py"):
        (tmp_path / name).write_text(look, encoding="utf-8")
    # site.addsitedir in a fresh Python is what happens to the folders of packages at its start.
    start = "import runpy, site, sys; words = sys.argv[1:]; sys.orig_argv = ['python', *words]; site.addsitedir('.')\n"
    start += f"exec({look!r})"
    words = [look if word == "LOOK" else word for word in words]
    run = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(installs)
    assert run.stderr == ""


SPLIT = Split(parts=(0, 2, 6), layers=("embedding", "layers.0", "layers.1", "layers.2", "layers.3", "head"), interval=1)


@pytest.mark.parametrize(
    ("kinds", "bounds"),
    [
        ("E B B B B H", [0, 2, 6]),
        ("E P D B B B B N H", [0, 4, 9]),  # position, dropout before; norm after
        ("B B B B", [0, 1, 4]),
        ("E B B B B", [0, 2, 5]),
    ],
)
def test_bounds_in_a_scripts_own_layers(kinds: str, bounds: list[int]) -> None:
    assert place(SPLIT, kinds.split()) == bounds


def test_stages_of_the_embedding_or_the_head_alone() -> None:
    split = Split(parts=(0, 1, 5, 6), layers=SPLIT.layers, interval=0)
    assert place(split, ["E", "P", "B", "B", "B", "B", "N", "H"]) == [0, 2, 6, 8]
    with pytest.raises(InputError, match="leave one of 4 layers without any"):
        place(split, ["B", "B", "B", "B"])


@pytest.mark.parametrize("kinds", ["E B B B H", "B B B B X B B B B"])
def test_blocks_that_are_not_there_are_said(kinds: str) -> None:
    with pytest.raises(InputError, match="4 transformer blocks are not among"):
        place(SPLIT, kinds.split())


def test_only_the_plans_blocks_are_recomputed() -> None:
    kinds = ["Tokens", "Positions", "Block", "Block", "Block", "Block", "Norm", "Head"]
    assert checkpointing(SPLIT, kinds, {})["checkpointable_layers"] == ["Block"]
    assert "checkpointable_layers" not in checkpointing(SPLIT, kinds, {"checkpointable_layers": ["Head"]})
    kept = checkpointing(replace(SPLIT, interval=0), kinds, {})
    assert kept == {"activation_checkpoint_interval": 0}


def test_a_split_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pipeline_split.json"
    data = {"parts": list(SPLIT.parts), "layers": list(SPLIT.layers), "activation_checkpoint_interval": 1}
    path.write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)
    assert read_split(path) == read_split(data) == SPLIT
    with pytest.raises(InputError, match="no plan for the pipeline"):
        read_split(None)
    monkeypatch.setenv(PLAN_VARIABLE, str(path))
    assert read_split(None) == SPLIT


@pytest.mark.parametrize(
    "data",
    [
        {"parts": [0, 2, 2, 6], "layers": list(SPLIT.layers), "activation_checkpoint_interval": 1},
        {"parts": [0, 2, 5], "layers": list(SPLIT.layers), "activation_checkpoint_interval": 1},
        {"parts": [0, 6]},
        {"schema_version": 1},
        {"schema_version": 99},
    ],
)
def test_what_is_no_plan_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read_split(data)
