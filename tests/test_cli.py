"""The command line as people meet it: one clear message and the right exit code for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from uniap_tune import __version__
from uniap_tune.cli import main
from uniap_tune.errors import ExitCode, InfeasibleError, InputError, StoppedError, TuneError, message

JOB = ["--global-batch", "128", "--seq-length", "4096"]
CLUSTER = ["--cluster", "1x8:a100-80gb"]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def config(tmp_path: Path, **changes: Any) -> str:
    """A config.json with changes."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}), encoding="utf-8")
    return str(path)


def check_refused(code: int, captured: pytest.CaptureResult[str], named: str) -> None:
    """Exit code 2, nothing on stdout, one error line that names the culprit, then only why and fix."""
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    first, *rest = captured.err.splitlines()
    assert first.startswith("error: ")
    assert named in first
    assert len(first) < 400
    assert all(line.startswith(("  why: ", "  fix: ")) for line in rest)


def test_the_sound_config_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config(tmp_path), *CLUSTER, *JOB, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "optimal"


BAD_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "perceiver"}, "perceiver"),
    ({"hidden_size": -1024}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": -5}, "vocab_size"),
    ({"intermediate_size": "4096"}, "intermediate_size"),
    ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
]


@pytest.mark.parametrize(("change", "named"), BAD_MODELS, ids=[named for _, named in BAD_MODELS])
def test_bad_models(change: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, **change)
    code = main(["plan", path, *CLUSTER, *JOB, "--json"])
    captured = capsys.readouterr()
    check_refused(code, captured, "config.json")
    assert named in captured.err


def test_heads_need_not_divide_where_head_dim_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, num_attention_heads=7, num_key_value_heads=7, head_dim=128)
    assert main(["plan", path, *CLUSTER, *JOB, "--json"]) == 0


@pytest.mark.parametrize("content", ["", "{", "not json", "[]", "\x00", '{"model_type": '])
def test_model_files_that_are_no_json(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    check_refused(main(["plan", str(path), *CLUSTER, *JOB]), capsys.readouterr(), "config.json")


BAD_INPUTS: list[tuple[list[str], str]] = [
    (["missing/config.json", *CLUSTER, *JOB], "missing/config.json"),
    (["no-such-model", *CLUSTER, *JOB], "no-such-model"),
    (["llama-2-7b", "--cluster", "0x8:h100", *JOB], "0x8:h100"),
    (["llama-2-7b", "--cluster", "1x0:h100", *JOB], "1x0:h100"),
    (["llama-2-7b", "--cluster", "1x8:h1000", *JOB], "h1000"),
    (["llama-2-7b", "--cluster", "1x8", *JOB], "1x8"),
    (["llama-2-7b", "--cluster", "", *JOB], "--cluster"),
    (["llama-2-7b", "--cluster", "missing.yaml", *JOB], "missing.yaml"),
    (["llama-2-7b", "--cluster", "1x37:h100", *JOB], "--global-batch 128"),
    (["llama-2-7b", *CLUSTER, "--global-batch", "100", "--seq-length", "4096", "--fix", "dp=8"], "dp=8"),
    (["llama-2-7b", *CLUSTER, "--global-batch", "3", "--seq-length", "4096", "--fix", "dp=2"], "batch of 3"),
    (["gpt2", *CLUSTER, "--global-batch", "8", "--seq-length", "2048"], "1024 learned positions"),
    (["llama-2-7b", *CLUSTER, *JOB, "--fix", "pp=3"], "pp=3"),
    (["llama-2-7b", *CLUSTER, *JOB, "--fix", "tp=x"], "--fix tp=x"),
    (["llama-2-7b", *CLUSTER, *JOB, "--max", "xp=2"], "--max xp=2"),
    (["llama-2-7b", *CLUSTER, *JOB, "--forbid", "recompute=never"], "--forbid recompute=never"),
    (["llama-2-7b", *CLUSTER, *JOB, "--memory-fraction", "0.01"], "--memory-fraction"),
    (["llama-2-7b", *CLUSTER, *JOB, "--precision", "fp8"], "fp8"),
    (["gemma-2-9b", *CLUSTER, *JOB], "gemma-2-9b"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUTS, ids=[named for _, named in BAD_INPUTS])
def test_bad_inputs(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", *arguments, "--json"])
    check_refused(code, capsys.readouterr(), named)


BAD_USAGE: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["plan"], "MODEL"),
    (["fly"], "fly"),
    (["plan", "llama-2-7b", *CLUSTER, "--seq-length", "4096"], "--global-batch"),
    (["plan", "llama-2-7b", *CLUSTER, "--global-batch", "-3", "--seq-length", "4096"], "--global-batch"),
    (["plan", "llama-2-7b", *CLUSTER, "--global-batch", "1.5", "--seq-length", "4096"], "1.5"),
    (["plan", "llama-2-7b", *CLUSTER, "--global-batch", "8", "--seq-length", "0"], "--seq-length"),
    (["plan", "llama-2-7b", *CLUSTER, "--global-batch", "9" * 5000, "--seq-length", "1"], "--global-batch"),
    (
        ["plan", "llama-2-7b", *CLUSTER, "--global-batch", "9" * 20, "--seq-length", "1"],
        "is more than 1,000,000,000,000",
    ),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--target", "jax"], "jax"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--solver", "gurobi"], "gurobi"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--memory-fraction", "1.5"], "1.5"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--memory-fraction", "nan"], "nan"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--time-limit", "-1"], "-1"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--time-limit", "inf"], "inf"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--top", "0"], "--top"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--target-x", "any"], "--target-x"),
    (["plan", "llama-2-7b", *CLUSTER, *JOB, "--mem", "0.9"], "--mem"),
    (["solve"], "PROBLEM.json"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_USAGE, ids=[f"{n}" for n in range(len(BAD_USAGE))])
def test_bad_usage(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert "error: " in last
    assert named in last


def test_infeasible(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama-2-13b", "--cluster", "1x1:a100-80gb", "--global-batch", "8", "--seq-length", "4096"]
    assert main([*arguments, "--json"]) == 3
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema_version"] == 1
    assert data["status"] == "infeasible"
    assert data["relaxations"]
    assert captured.err.startswith("error: llama-2-13b does not fit on ")
    assert main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(f"    - {relaxation}" in captured.err.splitlines() for relaxation in data["relaxations"])


def test_a_folder_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = ["plan", config(tmp_path), *CLUSTER, *JOB, "-o", str(folder)]
    assert main(arguments) == 0
    before = (folder / "plan.json").read_bytes()
    (folder / "launch.sh").write_text("mine")
    capsys.readouterr()
    check_refused(main(arguments), capsys.readouterr(), "out")
    assert (folder / "launch.sh").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert (folder / "plan.json").read_bytes() == before
    assert (folder / "launch.sh").read_text() != "mine"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"uniap-tune {__version__}\n"


def test_messages() -> None:
    assert message(InputError("a", why="b", fix="c")) == "error: a\n  why: b\n  fix: c"
    assert message(InfeasibleError("a", relaxations=["x", "y"])) == "error: a\n    - x\n    - y"
    codes = [error("a").exit_code for error in (TuneError, InputError, InfeasibleError, StoppedError)]
    assert codes == [1, 2, 3, 5]


class _Raising:
    """An entry of the solvers that fails in the way told."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_args: object, **_options: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("boom"), ExitCode.INTERNAL, "internal error: RuntimeError: boom"),
        (KeyboardInterrupt(), ExitCode.STOPPED, "stopped"),
        (StoppedError("too late"), ExitCode.STOPPED, "error: too late"),
    ],
)
def test_failures_inside(
    error: BaseException,
    code: ExitCode,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("uniap_tune.planner.run", _Raising(error))
    monkeypatch.delenv("UNIAP_TUNE_DEBUG", raising=False)
    assert main(["plan", "llama-2-7b", *CLUSTER, *JOB]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == said


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniap_tune.planner.run", _Raising(RuntimeError("boom")))
    monkeypatch.setitem(os.environ, "UNIAP_TUNE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        main(["plan", "llama-2-7b", *CLUSTER, *JOB])


GPT2 = "plan gpt2 --cluster 1x1:a100 --global-batch 8 --seq-length 1024"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("--json >/dev/full", ExitCode.BAD_INPUT, "error: the output cannot be written"),
        (">/dev/full", ExitCode.BAD_INPUT, "error: the output cannot be written"),
        ("--json >&-", ExitCode.OK, ""),
        (">&- 2>&-", ExitCode.OK, ""),
        ("| true", ExitCode.OK, ""),  # the report: rich writes it
        ("--json | true", ExitCode.OK, ""),
    ],
)
def test_output_that_nobody_can_read(redirection: str, code: int, said: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m uniap_tune {GPT2} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "internal error" not in done.stderr
    assert "Exception ignored" not in done.stderr
