"""``explain`` on the command line: what it prints, in which columns, as JSON, and with which exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uniap_tune.cli import main
from uniap_tune.errors import ExitCode
from uniap_tune.explain.summary import PART_NAMES
from uniap_tune.explain.whatif import Verdict
from uniap_tune.report.explain import _REMEDIES


def job(cluster: str, batch: int, *options: str, model: str = "llama-2-7b") -> list[str]:
    """Arguments of ``explain``."""
    return [model, "--cluster", cluster, "--global-batch", str(batch), "--seq-length", "4096", *options]


WHY = ("--why-not", "tp=8", "--why-not", "tp=3,pp=2", "--why-not", "zero=0,pp=1,tp=1")
JOBS = {
    "one stage": job("1x8:a100-40gb", 64, *WHY, "--max", "tp=4", "--forbid", "zero=3"),
    "pipeline": job("2x8:a100-40gb", 64, "--fix", "pp=4", "--why-not", "pp=2,vpp=2,recompute=full"),
    "many stages": job("4x8:a100-80gb", 64, "--fix", "pp=32"),
    "any": job("1x2:h200", 8, "--target", "any", "--why-not", "zero=0"),
    "deepspeed": job("1x8:a100-40gb", 64, "--target", "deepspeed", *WHY),
    "experts": job("1x8:h200", 16, "--why-not", "ep=1", model="qwen3-30b-a3b"),
    "tiny steps": ["gpt2", "--cluster", "1x2:h100", "--global-batch", "4", "--seq-length", "128", "--why-not", "tp=2"],
}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["explain", *arguments]) == ExitCode.OK
    return capsys.readouterr().out


def check_width(text: str) -> None:
    """At most 80 columns, no line ends in blanks, and no figure is parted from its unit or name."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert not re.search(r"\d\n\s+(?:GiB|TiB|MiB|s|ms|us|x \d)\b", plain)
    assert not re.search(r"\b(?:pp|vpp|tp|dp|cp|ep|zero|stage|micro-batch)\n\s+\d", plain)
    assert "…" not in re.sub(r"^ +…$", "", plain, flags=re.MULTILINE)  # nothing is cut off but stages


@pytest.mark.parametrize("name", JOBS)
def test_report(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(JOBS[name], capsys)
    check_width(answer)
    assert "\x1b" not in answer
    for label in ("Ideal", "Memory", "if there were"):
        assert re.search(rf"^{label}", answer, re.MULTILINE), label
    asked = JOBS[name].count("--why-not")
    assert len(re.findall(r"^Why not", answer, re.MULTILINE)) == asked


def test_colour_changes_no_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(JOBS["one stage"], capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run(JOBS["one stage"], capsys)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_a_long_name_is_no_excuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-model-with-a-name-that-somebody-made-up-to-tell-its-whole-story-in-one-go-v2"
    config = {
        "model_type": "llama", "_name_or_path": name, "num_hidden_layers": 4, "hidden_size": 1024,
        "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 32000,
    }  # fmt: skip
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = [str(folder), "--cluster", "1x4:l4", "--global-batch", "8", "--seq-length", "1024", "--why-not", "tp=3"]
    check_width(run(arguments, capsys))


def test_answers_to_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    answer = " ".join(run(JOBS["one stage"], capsys).split())
    assert re.search(r"Why not tp 8: costs [\d.]+%: [\d.]+ s a step, pp 1, tp 8, .*?; .*? [+-][\d.]+ m?s", answer)
    assert "Why not tp 3, pp 2: not legal: tp(3) x pp(2) = 6 does not divide the 8 devices" in answer or (
        "Why not tp 3, pp 2: not legal: tp(3) does not divide the 8 devices; tp 3 does not divide the 32" in answer
    )
    assert re.search(r"zero 0, pp 1, tp 1: stage 0 exceeds the [\d.]+ GiB by [\d.]+ GiB even in the leanest", answer)
    assert "--max tp=4 costs nothing" in answer
    assert re.search(r"--forbid zero=3 costs ([\d.]+%: without it|nothing)", answer)


def test_a_question_may_find_a_better_plan(capsys: pytest.CaptureFixture[str]) -> None:
    answer = " ".join(run(job("1x8:a100-40gb", 64, "--fix", "tp=8", "--why-not", "tp=2,zero=1"), capsys).split())
    found = re.search(
        r"Why not tp 2, zero 1: saves ([\d.]+)%: [\d.]+ s a step, .*?--fix tp=2 --fix zero=1 asks", answer
    )
    assert found is not None
    assert re.search(r"Restriction --fix tp=8 costs [\d.]+%: without it", answer)


def test_every_part_has_a_name_and_a_remedy() -> None:
    assert set(PART_NAMES) == set(_REMEDIES)
    names = max(map(len, PART_NAMES.values()))
    assert max(map(len, _REMEDIES.values())) <= 80 - names - len(" 12345.6 100.0% ")


_DOCUMENTS: dict[str, Any] = {}


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON; the same arguments are explained once."""
    key = " ".join(arguments)
    if key not in _DOCUMENTS:
        _DOCUMENTS[key] = json.loads(run([*arguments, "--json"], capsys))
    return _DOCUMENTS[key]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = document(JOBS["one stage"], capsys)
    assert data["schema_version"] == 1
    assert data["status"] == "optimal"
    assert data["complete"] is True
    step = data["step"]
    assert step["seconds"] == data["plan"]["step_time_s"] == pytest.approx(sum(step["parts_s"].values()))
    assert 0 < step["ideal_s"] < step["seconds"]
    assert [answer["verdict"] for answer in data["why_not"]] == ["costs", "not legal", "does not fit"]
    lean = data["why_not"][2]
    assert lean["over_bytes"] == max(lean["other"]["stage_bytes"]) - data["plan"]["memory_limit_bytes"] > 0
    assert [item["option"] for item in data["restrictions"]] == ["--max tp=4", "--forbid zero=3"]
    assert data["memory"]["binds"] is True
    assert data["memory"]["next"]["limit_bytes"] > data["plan"]["memory_limit_bytes"]
    assert data["runner_up"]["slower_proven"] >= 0
    assert [(item["changed"], item["factor"]) for item in data["sensitivities"]] == [
        ("usable memory", 0.9), ("usable memory", 1.1), ("global batch", 0.5), ("global batch", 2.0),
    ]  # fmt: skip
    assert json.loads(run([*JOBS["one stage"], "--json"], capsys)) == data


def keys(value: Any) -> Iterator[str]:
    """All keys of a document, but those of plans, knobs and parts, which are documented elsewhere."""
    if isinstance(value, list):
        for item in value:
            yield from keys(item)
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in {"plan", "knobs", "asked", "parts_s", "targets"}:
                yield from keys(item)


def test_every_key_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs/reference/explain.md").read_text(encoding="utf-8")
    found = set(keys(document(JOBS["one stage"], capsys))) | set(keys(document(JOBS["any"], capsys)))
    assert {key for key in found if f"`{key}`" not in text} == set()
    assert {str(verdict) for verdict in Verdict if f"`{verdict}`" not in text} == set()


def test_knobs_of_an_alternative_lead_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    other = document(JOBS["pipeline"], capsys)["other_grid"]
    fixed = [word for knob, value in other["knobs"].items() for word in ("--fix", f"{knob}={value}")]
    assert main(["plan", *job("2x8:a100-40gb", 64, *fixed), "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["objective_s"] <= other["objective_s"] * (1 + 1e-9)


def test_engines_of_the_free_target(capsys: pytest.CaptureFixture[str]) -> None:
    data = document(JOBS["any"], capsys)
    assert set(data["targets"]) == {"megatron", "deepspeed"}
    assert data["runner_up"]["slower_proven"] <= data["other_grid"]["slower_proven"]


# -- a plan that was written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [[], ["--target", "deepspeed", "--max", "tp=2", "--memory-fraction", "0.8"], ["--forbid", "zero=3"]]
)
def test_a_written_plan_is_explained_from_its_inputs(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job("1x8:a100-40gb", 64, *options)
    folder = tmp_path / "out"
    assert main(["plan", *arguments, "--no-check", "-o", str(folder)]) == ExitCode.OK
    capsys.readouterr()
    data = document(arguments, capsys)
    for source in (folder, folder / "plan.json"):
        assert main(["explain", str(source), "--json"]) == ExitCode.OK
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert captured.err == ""
        assert found["plan"]["stages"] == data["plan"]["stages"]
        assert found["restrictions"] == data["restrictions"]


def test_a_plan_that_is_not_found_again_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", *job("1x8:a100-40gb", 64, "--fix", "tp=2"), "--json"]) == ExitCode.OK
    plan = json.loads(capsys.readouterr().out)
    plan["inputs"]["fix"] = {"tp": "4"}
    path.write_text(json.dumps(plan), encoding="utf-8")
    assert main(["explain", str(path)]) == ExitCode.OK
    captured = capsys.readouterr()
    assert "plan.json has another plan than is found now, which is explained: pp 1, tp 2" in captured.err
    assert ", tp 4, " in captured.out.splitlines()[2]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["explain", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_what_is_missing_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(["llama-2-7b", "--cluster", "1x8:h100"], capsys)
    assert code == ExitCode.BAD_INPUT
    assert "needs --global-batch, --seq-length" in error
    path = tmp_path / "plan.json"
    assert main(["plan", *job("1x8:a100-40gb", 64), "--json"]) == ExitCode.OK
    plan = json.loads(capsys.readouterr().out)
    path.write_text(json.dumps(plan), encoding="utf-8")
    code, error = failure([str(path), "--global-batch", "32", "--target", "megatron", "--fix", "tp=2"], capsys)
    assert code == ExitCode.BAD_INPUT
    assert "--global-batch, --target, --fix cannot be given" in error
    for key in ("model", "fix", "memory_limit_bytes"):
        inputs = {name: value for name, value in plan["inputs"].items() if name != key}
        path.write_text(json.dumps(plan | {"inputs": inputs}), encoding="utf-8")
        code, error = failure([str(path)], capsys)
        assert code == ExitCode.BAD_INPUT
        assert "inputs is not what a plan was made from" in error


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("tp", "--why-not tp: not of the form KNOB=VALUE"),
        ("tp=2,speed=9", "--why-not speed=9: there is no knob 'speed'"),
        ("tp=2,tp=4", "--why-not tp is given twice"),
        ("recompute=some", "unknown recompute mode"),
    ],
)
def test_questions_that_make_no_sense(question: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(job("1x8:a100-40gb", 64, "--why-not", question), capsys)
    assert code == ExitCode.BAD_INPUT
    assert problem in error


def test_a_file_nested_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    code, error = failure([str(path), *job("1x8:a100-40gb", 64)[1:]], capsys)
    assert code == ExitCode.BAD_INPUT
    assert "not JSON" in error


def test_virtual_stages_are_advised_where_the_engine_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = job("1x8:a100-40gb", 64, "--fix", "pp=4", "--time-limit", "1")
    assert "more virtual stages" in run(arguments, capsys)
    assert "more virtual stages" not in run([*arguments, "--target", "deepspeed"], capsys)


def test_a_job_that_does_not_fit_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = job("1x1:l4", 8, model="llama-2-13b")
    code, error = failure(arguments, capsys)
    assert code == ExitCode.INFEASIBLE
    assert "devices with" in error
    assert main(["explain", *arguments, "--json"]) == ExitCode.INFEASIBLE
    data = json.loads(capsys.readouterr().out)
    assert data["status"] == "infeasible"
    assert data["relaxations"]


def test_what_time_runs_out_for_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run([*JOBS["pipeline"], "--time-limit", "0.001"], capsys)
    check_width(answer)
    assert "Left out" in answer


def test_the_only_plan_has_no_runner_up(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [x for knob in ("pp=1", "tp=1", "zero=3", "mbs=1", "recompute=none") for x in ("--fix", knob)]
    answer = " ".join(run(job("1x8:a100-40gb", 64, *fixed), capsys).split())
    assert "Runner-up None: no other configuration fits." in answer


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = job("1x8:a100-40gb", 64, "--fix", "pp=1", "--why-not", "tp=2,zero=1")
    run(arguments, capsys)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["explain", *arguments]) == ExitCode.OK
    shown = capsys.readouterr().err
    assert "solving: tp=2 zero=1" in shown
    assert shown.endswith("\r\x1b[K")
