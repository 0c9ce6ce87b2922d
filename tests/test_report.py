"""The answer for people: everything they need, in 80 columns, without colour off a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from uniap_tune.cli import main


def job(cluster: str, batch: int, *options: str) -> list[str]:
    """Arguments of ``plan`` for Llama-2-7B."""
    size = ["--global-batch", str(batch), "--seq-length", "4096"]
    return ["llama-2-7b", "--cluster", cluster, *size, *options]


JOBS = {
    "one stage": job("1x8:a100-80gb", 128),
    "pipeline": job("1x8:a100-80gb", 16, "--fix", "pp=4"),
    "many stages": job("4x8:a100-80gb", 64, "--fix", "pp=32"),
    "any": job("1x8:a100-40gb", 64, "--target", "any"),
    "deepspeed": job("1x8:a100-40gb", 64, "--target", "deepspeed"),
}


@pytest.fixture
def answer(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *request.param]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("answer", JOBS.values(), ids=JOBS, indirect=True)
def test_fits_eighty_columns_without_escapes(answer: str) -> None:
    assert max(len(line) for line in answer.splitlines()) <= 80
    assert "\x1b" not in answer
    labels = [line.split("  ")[0].strip() for line in answer.splitlines() if line[:1].isupper()]
    for label in ("Time", "Binds", "Runner-up", "Proof", "Not modelled", "Next"):
        assert any(found.startswith(label) for found in labels), label


@pytest.mark.parametrize("answer", [JOBS["one stage"]], indirect=True)
def test_verdict(answer: str) -> None:
    first, second, third, *_ = answer.splitlines()
    assert first == "llama-2-7b on 1x8:a100-80gb-sxm with megatron: optimal"
    assert re.fullmatch(r"[\d.]+ s a step, [\d.]+k tokens/s, MFU [\d.]+%, [\d.]+ of [\d.]+ GiB", second)
    assert re.match(r"pp \d+, tp \d+, dp \d+, zero \d, micro-batch \d+ x \d+, recompute ", third)


def rows(answer: str) -> list[list[str]]:
    lines = answer.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


@pytest.mark.parametrize("answer", [JOBS["pipeline"]], indirect=True)
def test_stage_table(answer: str) -> None:
    """One row a stage; its blocks add up, its parts of memory add up to its total."""
    table = rows(answer)
    assert [row[0] for row in table] == ["0", "1", "2", "3"]
    assert table[0][1].startswith("E+")
    assert table[-1][1].endswith("+H")
    assert sum(int(re.sub(r"\D", "", row[1])) for row in table) == 32
    for row in table:
        *parts, total, share = row[-7:]
        assert sum(map(float, parts)) == pytest.approx(float(total), abs=0.31)
        assert 0 < int(share.rstrip("%")) <= 100


@pytest.mark.parametrize("answer", [JOBS["many stages"]], indirect=True)
def test_long_tables_are_cut_in_the_middle(answer: str) -> None:
    table = rows(answer)
    assert len(table) == 16
    assert ["…"] in table
    assert [row[0] for row in table][-2:] == ["30", "31"]


@pytest.mark.parametrize("answer", [JOBS["any"]], indirect=True)
def test_prices_of_restrictions_are_shown(answer: str) -> None:
    assert re.search(r"^Megatron +[\d.]+% slower at best", answer, re.MULTILINE)
    assert re.search(r"^Deepspeed +[\d.]+% slower at best", answer, re.MULTILINE)


def test_top_and_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main(["plan", *JOBS["one stage"], "--top", "4", "-o", str(folder)]) == 0
    answer = capsys.readouterr().out
    assert all(label in answer for label in ("Runner-up", "No. 3", "No. 4"))
    assert "No. 5" not in answer
    assert "Written" in answer
    assert "launch.sh" in answer.replace("\n", "")
    assert (folder / "plan.json").exists()


def test_the_only_plan_has_no_runner_up(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [x for knob in ("pp=1", "tp=1", "zero=1", "mbs=1", "recompute=none") for x in ("--fix", knob)]
    assert main(["plan", *JOBS["one stage"], *fixed]) == 0
    assert "none: no other configuration fits" in " ".join(capsys.readouterr().out.split())


def test_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["plan", *JOBS["one stage"]]) == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", capsys.readouterr().out)
