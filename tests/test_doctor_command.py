"""``uniap-tune doctor``: what people see, the exit codes, the JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doctors import RECIPES
from uniap_tune.cli import main
from uniap_tune.doctor.finding import FINDINGS
from uniap_tune.errors import ExitCode

DOCS = Path(__file__).parent.parent / "docs"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def settings(name: str, cluster: str, *pairs: str, batch: int = 128) -> list[str]:
    """Arguments of ``doctor`` for plain settings."""
    job = ["--model", name, "--cluster", cluster, "--global-batch", str(batch), "--seq-length", "4096"]
    return [*job, *(word for pair in pairs for word in ("--set", pair))]


def recipe(name: str, cluster: str) -> list[str]:
    """Arguments of ``doctor`` for a recipe of the tests."""
    return [str(RECIPES / name), "--cluster", cluster]


CALLS: dict[str, tuple[list[str], int]] = {
    "fits": (settings("llama-2-7b", "1x8:a100-80gb", "tp=2", "pp=2", "dp=2", "zero=1", "mbs=1", "recompute=none"), 0),
    "many findings": (settings("llama-2-7b", "1x8:a100-80gb", "tp=4", "recompute=full", "sp=off", "overlap=off"), 0),
    "one change is enough": (settings("llama-3-70b", "8x8:a100-80gb", "tp=8", "pp=2"), 4),
    "two changes": (settings("llama-2-13b", "1x8:a100-40gb", "zero=1", "mbs=4"), 4),
    "nothing helps": (settings("llama-3-70b", "1x8:a100-80gb", "tp=8"), 4),
    "many stages": (recipe("shell/gpt3_175b.sh", "16x8:a100-80gb"), 0),
    "uneven layout": (recipe("shell/gpt_uneven_layout.sh", "8x8:h100"), 0),
    "experts": (recipe("shell/mixtral_8x7b.sh", "8x8:h100"), 0),
    "does not run": (recipe("model_config/gpt3_tp2_pp2.yaml", "1x6:a100-80gb"), 2),
    "deepspeed": (
        [*settings("llama-2-7b", "1x8:a100-40gb", "zero=2", "mbs=2"), "--target", "deepspeed"],
        4,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_exit_codes_and_eighty_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code = CALLS[name]
    assert main(["doctor", *arguments]) == code
    printed = capsys.readouterr()
    assert not printed.err
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in printed.out
    verdict = {0: ": fits", 4: ": does not fit", 2: ": does not run"}[code]
    assert lines[0].partition(" with ")[2].partition(":")[0] in ("Megatron", "DeepSpeed")
    assert verdict in lines[0]


@pytest.mark.parametrize("name", CALLS)
def test_colour_changes_no_line(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["doctor", *CALLS[name][0]])
    plain = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["doctor", *CALLS[name][0]])
    coloured = capsys.readouterr().out
    assert "\x1b[1" in coloured
    assert [line.rstrip() for line in ESCAPES.sub("", coloured).splitlines()] == [
        line.rstrip() for line in plain.splitlines()
    ]
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor", *CALLS[name][0]])
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", capsys.readouterr().out)


@pytest.mark.parametrize("name", CALLS)
def test_no_line_is_left_with_half_a_word(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Words are not broken: every argument that the JSON names stands whole in the report."""
    main(["doctor", *CALLS[name][0], "--json"])
    found = json.loads(capsys.readouterr().out)
    main(["doctor", *CALLS[name][0]])
    words = capsys.readouterr().out.split()
    for change in found["changes"]:
        for edit in change["edits"]:
            assert set(edit.split()) <= set(words), edit


def section(text: str, label: str) -> str:
    """What stands beside a label, on one line."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(label))
    body = [lines[start][15:]]
    for line in lines[start + 1 :]:
        if not line.startswith(" " * 15):
            break
        body.append(line[15:])
    return " ".join(" ".join(body).split())


def test_what_a_newcomer_reads(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", *CALLS["many findings"][0]])
    text = capsys.readouterr().out
    assert re.match(r"every device needs [\d.]+ GiB of [\d.]+ GiB: [\d.]+ GiB free\.", section(text, "Memory"))
    assert re.match(r"[\d.]+ s a step \([\d.]+ s to [\d.]+ s in 4 of 5 runs like it\)", section(text, "Time"))
    findings = section(text, "Findings")
    assert "Change: --sequence-parallel (" in findings
    assert "Change: --overlap-grad-reduce" in findings
    assert re.match(r"1\. .* -> .*: [\d.]+% faster, [\d.]+ s a step, [\d.]+ GiB free --", section(text, "Changes"))


def stage_rows(text: str) -> list[list[str]]:
    """The table of stages."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


def test_stages_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", *CALLS["fits"][0]])
    rows = stage_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["0", "1"]
    for row in rows:
        *parts, total, _ = map(float, row[2:])
        assert sum(parts) == pytest.approx(total, abs=0.3)


def test_the_fullest_of_many_stages_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ",".join(["4"] * 9 + ["20"] + ["4"] * 6)
    main(["doctor", *settings("llama-3-70b", "16x8:a100-80gb", "tp=8", "pp=16", f"layers={layers}")])
    rows = stage_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5", "…", "9", "…", "14", "15"]
    assert rows[7][1] == "20"


def test_what_does_not_fit_says_what_takes_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", *CALLS["nothing helps"][0]])
    text = capsys.readouterr().out
    assert section(text, "Takes most").startswith("optimizer states 98")
    assert "no single change is enough" in section(text, "To make it fit")


# -- JSON --------------------------------------------------------------------------------------------------------------


def keys(value: Any) -> Iterator[str]:
    """All keys of a document; of parts and settings, which other pages list, only that they are there."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("settings", "time", "memory"):
                yield from keys(inner)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


@pytest.mark.parametrize("name", CALLS)
def test_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code = CALLS[name]
    assert main(["doctor", *arguments, "--json"]) == code
    first = capsys.readouterr().out
    found = json.loads(first)
    assert found["schema_version"] == 1
    assert found["status"] == {0: "fits", 4: "out_of_memory", 2: "refused"}[code]
    assert (found["today"] is None) == (code == 2)
    assert bool(found["broken_rules"]) or code != 2
    if code == 4:
        assert min(stage["room_bytes"] for stage in found["today"]["stages"]) < 0
    text = (DOCS / "reference/doctor.md").read_text(encoding="utf-8")
    assert {key for key in keys(found) if f"`{key}`" not in text} == set()
    main(["doctor", *arguments, "--json"])
    assert capsys.readouterr().out == first


def test_top(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", *CALLS["fits"][0], "--top", "1", "--json"])
    assert len(json.loads(capsys.readouterr().out)["changes"]) == 1


def test_every_finding_is_documented() -> None:
    text = (DOCS / "reference/doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    meanings = {known.name: known.meaning.replace("``", "`").replace("\n    ", " ") for known in FINDINGS}
    assert sorted(rows) == sorted((known.name, known.kind, known.engine, meanings[known.name]) for known in FINDINGS)


# -- what is given wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "--model is not given"),
        (["--model", "llama-2-7b"], "--cluster is not given"),
        (["--model", "llama-2-7b", "--cluster", "1x8:h100"], "--global-batch is not given"),
        ([*settings("llama-2-7b", "1x8:h100"), "--set", "tp"], "not of the form"),
        ([*settings("llama-2-7b", "1x8:h100"), "--set", "xx=1"], "no such setting"),
        ([*recipe("shell/gpt3_175b.sh", "1x8:h100"), "--model", "llama-2-7b"], "says that itself"),
        ([str(RECIPES / "shell/gpt3_175b.sh")], "--cluster is not given"),
        (["nothing.json", "--cluster", "1x8:h100"], "cannot be read"),
    ],
)
def test_errors(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == ExitCode.BAD_INPUT
    printed = capsys.readouterr()
    assert what in printed.err
    assert "fix:" in printed.err
    assert not printed.out


def test_a_json_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 4096}', encoding="utf-8")
    assert main(["doctor", str(path), "--cluster", "1x8:h100"]) == ExitCode.BAD_INPUT
    assert "neither a DeepSpeed JSON nor a plan" in capsys.readouterr().err


def test_variables_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--set`` beside a script gives its variables, as for ``tune``."""
    text = (RECIPES / "shell/gpt3_175b.sh").read_text(encoding="utf-8")
    path = tmp_path / "train.sh"
    path.write_text(text.replace("--micro-batch-size 1", "--micro-batch-size $MBS"), encoding="utf-8")
    arguments = ["doctor", str(path), "--cluster", "16x8:a100-80gb", "--json"]
    assert main(arguments) == ExitCode.BAD_INPUT
    capsys.readouterr()
    assert main([*arguments, "--set", "MBS=2"]) in (0, 4)
    assert json.loads(capsys.readouterr().out)["settings"]["micro-batch"] == "2"


def test_the_folder_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpt2", "--cluster", "1x1:a100", "--global-batch", "8", "--seq-length", "1024"]
    assert main(["plan", *arguments, "-o", str(tmp_path)]) == ExitCode.OK
    capsys.readouterr()
    assert main(["doctor", str(tmp_path)]) == ExitCode.OK
    of_folder = capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "plan.json")]) == ExitCode.OK
    assert of_folder == capsys.readouterr().out
