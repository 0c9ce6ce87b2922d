"""The documentation keeps what it promises: links, options, keys and examples."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.test_imports import LAYERS
from uniap_tune import cli
from uniap_tune.cost import parts
from uniap_tune.deepspeed.options import FLAG, KEYS
from uniap_tune.errors import ExitCode
from uniap_tune.space import KNOBS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])
COMMANDS = {module.NAME: module for module in (import_module(f"uniap_tune.commands.{name}") for name in cli._COMMANDS)}
# Commands whose arguments are another program's, and the commands of their own behind them.
BEHIND = {"deepspeed": ("check", "enable", "disable", "status")}

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return [text for kind, text in _FENCE.findall(read(page)) if kind == language]


def section(text: str, title: str) -> str:
    """The part of a page under a heading of the second level."""
    return re.split(rf"^## {re.escape(title)}$", text, maxsplit=1, flags=re.MULTILINE)[1].split("\n## ")[0]


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} is not there"
        assert target.is_relative_to(ROOT), f"{page.relative_to(ROOT)}: {link} leaves the project"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: no heading for {link}"


def test_every_page_is_in_the_index() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in _LINK.findall(read(DOCS / "README.md"))}
    pages = {page.resolve() for page in DOCS.rglob("*.md")} - {(DOCS / "README.md").resolve()}
    assert not sorted(str(page.relative_to(DOCS)) for page in pages - linked)


# -- the command line --------------------------------------------------------------------------------------------------


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that ``--help`` of a command lists."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.split("\noptions:\n")[1].splitlines()
    heads = [line.strip().split("  ")[0] for line in lines if line.startswith("  -")]
    return {option for head in heads for option in _OPTION.findall(head)} - {"-h", "--help"}


def option_tables(text: str) -> set[str]:
    """The options in the first column of the tables of a section."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return {option for row in rows for code in re.findall(r"`([^`]*)`", row) for option in re.findall(r"^-\S+", code)}


def test_every_command_has_its_section() -> None:
    titles = re.findall(r"^## (.*)$", read(DOCS / "reference/cli.md"), re.MULTILINE)
    assert titles == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_documented_and_documented_options_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    documented = option_tables(section(read(DOCS / "reference/cli.md"), name))
    calls: list[tuple[str, ...]] = [(name, command) for command in BEHIND.get(name, ())] or [(name,)]
    expected = set().union(*(help_of(call, capsys) for call in calls))
    if name == "deepspeed":  # what is added to the launcher
        expected |= {f"{FLAG}{key}" for key in KEYS} | {"--autotune"}
    assert documented == expected


def test_options_of_the_pass_through_are_known() -> None:
    assert set(BEHIND) == {name for name, module in COMMANDS.items() if hasattr(module, "pass_through")}


def test_exit_codes_are_documented() -> None:
    table = re.findall(r"^\| (\d) \|", read(DOCS / "reference/cli.md"), re.MULTILINE)
    assert table == [str(int(code)) for code in ExitCode]


# -- commands that are shown -------------------------------------------------------------------------------------------


@cache
def consoles() -> tuple[tuple[str, str, str], ...]:
    """(page, command, what it printed) of every ``$ uniap-tune …`` in a code block."""
    found = []
    for page in PAGES:
        for _, block in _FENCE.findall(read(page)):
            for entry in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
                command, _, output = entry.partition("\n")
                if command.startswith("uniap-tune "):
                    found.append((str(page.relative_to(ROOT)), command, output))
    return tuple(found)


def parsed(command: str) -> list[str]:
    """The words after ``uniap-tune``, once its parser took them."""
    words = shlex.split(command, comments=True)[1:]
    if words[0] not in BEHIND and words != ["--version"]:
        try:
            cli._parser(list(COMMANDS.values())).parse_args(words)
        except SystemExit:
            pytest.fail(f"does not parse: {command}")
    return words


def test_there_are_commands_to_try() -> None:
    assert sum(command.startswith("uniap-tune plan") for _, command, _ in consoles()) >= 5


@pytest.mark.parametrize(("page", "command"), [console[:2] for console in consoles()])
def test_commands_parse(page: str, command: str) -> None:
    assert parsed(command), page


# Times may move with the constants of the cost model; the plan that is explained around them must not.
PLANS = [(command, output) for _, command, output in consoles() if re.search(r"^pp \d", output, re.MULTILINE)]


@pytest.mark.parametrize(("command", "output"), PLANS)
def test_plans_shown_are_those_found(
    command: str, output: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(parsed(command)) == ExitCode.OK
    printed = capsys.readouterr().out
    grids = [re.findall(r"^pp \d.*$", text, re.MULTILINE) for text in (output, printed)]
    assert grids[0] == grids[1]
    for folder in tmp_path.iterdir():  # where the page lists what was written
        listed = re.findall(rf"^\$ ls {folder.name}\n(.*?)^```$", read(DOCS / "tutorial/first-plan.md"), re.M | re.S)
        assert [text.split() for text in listed] == [sorted(path.name for path in folder.iterdir())]


@pytest.mark.parametrize("page", ["README.md", "docs/reference/plan.md"])
def test_python_examples_run(page: str, tmp_path: Path) -> None:
    (example,) = fenced(ROOT / page, "python")
    program = f"{example}print(plan.status)\n"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert run.stdout.endswith("optimal\n"), run.stderr
    assert not run.stderr


# -- solve.md ----------------------------------------------------------------------------------------------------------


def test_the_example_of_solve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, answer = fenced(DOCS / "reference/solve.md", "json")
    path = tmp_path / "problem.json"
    path.write_text(problem, encoding="utf-8")
    assert cli.main(["solve", str(path), "--json"]) == ExitCode.OK
    found, shown = json.loads(capsys.readouterr().out), json.loads(answer)
    assert list(found) == list(shown)
    del found["cpu_s"], shown["cpu_s"]
    for key, value in shown.items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12, abs=1e-12)), key
    assert cli.main(["solve", str(path)]) == ExitCode.OK
    (console,) = [output for page, _, output in consoles() if page == "docs/reference/solve.md"]
    assert capsys.readouterr().out == console


@pytest.mark.parametrize(
    ("limit", "code", "objective_s"), [(12e9, ExitCode.OK, 0.081), (7e9, ExitCode.INFEASIBLE, None)]
)
def test_the_other_limits_of_the_example(
    limit: float, code: int, objective_s: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(fenced(DOCS / "reference/solve.md", "json")[0])
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(data | {"memory_limit_bytes": limit}), encoding="utf-8")
    assert cli.main(["solve", str(path), "--json"]) == code
    found = json.loads(capsys.readouterr().out)["objective_s"]
    assert found == (None if objective_s is None else pytest.approx(objective_s, rel=1e-12))


def test_keys_of_a_problem_are_documented() -> None:
    text = read(DOCS / "reference/solve.md")
    data = json.loads(fenced(DOCS / "reference/solve.md", "json")[0])
    keys = {*data, *(key for entry in (*data["layers"], *data["edges"]) for key in entry)}
    assert {key for key in keys if f"`{key}`" not in text} == set()


# -- plan.md -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["megatron", "any"])
def test_every_key_of_a_plan_is_documented(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--cluster", "1x4:a100-40gb", "--global-batch", "8", "--seq-length", "1024"]
    assert cli.main(["plan", "gpt2", *job, "--target", target, "--top", "2", "--certify", "--json"]) == ExitCode.OK
    data = json.loads(capsys.readouterr().out)
    text = read(DOCS / "reference/plan.md")
    assert {key for key in plan_keys(data) if f"`{key}`" not in text} == set()


def plan_keys(data: dict[str, Any]) -> Iterator[str]:
    """All keys of a plan; of its inputs only the outer ones, which their own formats describe."""
    yield from data
    yield from data["inputs"]
    yield from data["solver"]
    yield from data["solver"]["pairs"][0]
    yield from data["certificate"]
    for stage in data["stages"]:
        yield from stage
        for name in ("time", "step", "memory"):
            yield from stage[name]
        yield from stage["strategies"][0]


def test_every_part_and_knob_is_documented() -> None:
    text = read(DOCS / "reference/plan.md")
    names = {value for key, value in vars(parts).items() if key.isupper() and isinstance(value, str)} | set(KNOBS)
    assert {name for name in names if f"`{name}`" not in text} == set()


# -- architecture.md ---------------------------------------------------------------------------------------------------


def test_layers_are_explained_in_their_order() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(read(DOCS / "architecture.md"), "Who may import whom"), re.MULTILINE)
    place = {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}
    names = [name for layer in LAYERS for name in layer if not name.startswith("__")]
    assert [name for name in names if name not in place] == []
    assert [place[name] for name in names] == sorted(place[name] for name in names)
