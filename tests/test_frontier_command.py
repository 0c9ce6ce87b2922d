"""The command and its answers: plans that ``plan`` finds again, goals, files, errors, and what people read."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plans import make_plan
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.registry import read_model
from uniap_tune.cli import main
from uniap_tune.deadline import Deadline
from uniap_tune.errors import ExitCode, InfeasibleError, InputError, StoppedError
from uniap_tune.frontier.scaling import against_devices, device_counts, part_of, reach
from uniap_tune.frontier.tradeoff import Goal, Point, Tradeoff, against_memory, marked
from uniap_tune.planner import Request, run
from uniap_tune.render import LAUNCH_FILES
from uniap_tune.space import parse_knobs
from uniap_tune.spec import Job
from uniap_tune.strategy import Strategy, Target

ROOT = Path(__file__).parent.parent
JOB = ["--global-batch", "32", "--seq-length", "4096", "--max", "pp=2"]  # few stages, to be quick
MEMORY = ["frontier", "llama-2-7b", "--cluster", "1x8:a100-40gb", *JOB]
DEVICES = ["frontier", "llama-2-7b", "--cluster", "2x8:a100-80gb", *JOB, "--over", "devices"]


def request(cluster: str = "1x8:a100-40gb", target: Target = Target.MEGATRON, *knobs: str) -> Request:
    return Request(
        model=read_model("llama-2-7b"),
        cluster=read_cluster(cluster),
        job=Job(global_batch=32, seq_length=4096),
        target=target,
        knobs=parse_knobs([*knobs], ["pp=2"], []),
    )


@pytest.fixture(scope="module")
def on_memory() -> Tradeoff:
    return against_memory(request(), count=6)


@pytest.fixture(scope="module")
def on_devices() -> Tradeoff:
    return against_devices(request("2x8:a100-80gb"), [4, 8, 16])


# -- points are plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", list(Target))
def test_plan_finds_every_point_in_its_memory(target: Target) -> None:
    """Each point's request has its peak as the limit; the search of ``plan`` knows nothing of frontiers."""
    found = against_memory(request(target=target), count=5)
    assert len(found.points) >= 2
    for point in found.points:
        again = run(point.request, near=1e-9).plan
        assert again.objective_s == pytest.approx(point.plan.objective_s, rel=2e-9)
        assert point.plan.peak_memory_bytes == pytest.approx(point.request.memory_limit_bytes, rel=1e-12)
        assert point.plan.memory_limit_bytes == point.request.memory_limit_bytes
        assert point.plan.inputs == point.request.describe()
        assert point.plan.gap <= 2e-9
    for faster, leaner in zip(found.points, found.points[1:], strict=False):
        assert faster.plan.objective_s < leaner.plan.objective_s
        assert faster.plan.peak_memory_bytes > leaner.plan.peak_memory_bytes


def test_frontier_begins_with_the_time_of_plan(on_memory: Tradeoff) -> None:
    best = run(on_memory.request, near=1e-9).plan
    assert on_memory.points[0].plan.objective_s == pytest.approx(best.objective_s, rel=2e-9)


def test_all_has_every_spread_point(on_memory: Tradeoff) -> None:
    everything = against_memory(on_memory.request)
    assert everything.complete
    assert not on_memory.complete
    peaks = [point.plan.peak_memory_bytes for point in everything.points]
    assert all(point.plan.peak_memory_bytes in peaks for point in on_memory.points)


def test_points_on_devices_are_those_of_plan(on_devices: Tradeoff) -> None:
    assert [point.devices for point in on_devices.points] == [4, 8, 16]
    for point in on_devices.points:
        assert point.plan == run(point.request).plan
        assert point.request.cluster.num_devices == point.devices
        assert point.device_seconds == point.devices * point.plan.step_time_s
        assert point.cost_per_step(7.2) == pytest.approx(point.device_seconds * 0.002)


def test_marked_are_those_that_another_beats_when_simulated() -> None:
    plan = make_plan(Target.MEGATRON, [2], Strategy(), Job(global_batch=4, seq_length=512), microbatches=4)
    values = [(1.0, 9.0), (2.0, 8.0), (2.1, 8.0), (3.0, 7.0), (3.0, 7.0), (4.0, 7.5)]
    points = [Point(request=request(), plan=replace(plan, step_time_s=seconds, mfu=size)) for seconds, size in values]
    found = marked(points, lambda point: point.plan.mfu)
    assert [point.dominated for point in found] == [False, False, True, False, False, True]


# -- parts of a cluster ------------------------------------------------------------------------------------------------


def test_numbers_of_devices() -> None:
    assert device_counts(read_cluster("1x8:h100")) == [1, 2, 4, 8]
    assert device_counts(read_cluster("3x8:h100")) == [1, 2, 4, 8, 16, 24]
    assert device_counts(read_cluster("13x8:h100")) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 104]
    assert device_counts(read_cluster("7x4:h100"), every=True) == [1, 2, 4, 8, 12, 16, 20, 24, 28]
    for cluster in (read_cluster("5x4:h100"), read_cluster("1x6:h100")):
        for count in device_counts(cluster, every=True):
            assert part_of(cluster, count).num_devices == count


def test_parts_of_a_cluster() -> None:
    cluster = read_cluster("4x8:h100")
    assert part_of(cluster, 32) is cluster
    part = part_of(cluster, 16)
    assert (part.num_nodes, part.devices_per_node, part.name) == (2, 8, f"2x8:{cluster.device.name}")
    part = part_of(cluster, 4)
    assert (part.num_nodes, part.devices_per_node, part.fast_domain) == (1, 4, 4)
    for count in (12, 40, 0):
        with pytest.raises(InputError, match=f"{count} devices: no part of"):
            part_of(cluster, count)


def test_numbers_without_a_plan_are_left_out_with_the_reason() -> None:
    found = against_devices(request("2x8:a100-40gb"), [1, 4, 16])
    assert [count for count, _ in found.left_out] == [1]
    assert found.left_out[0][1].startswith("nothing fits in ")
    assert [point.devices for point in found.points] == [4, 16]
    odd = against_devices(request("5x8:a100-80gb", Target.MEGATRON, "pp=1", "cp=1"), [8, 40])  # dp would be 5 or more
    assert [count for count, _ in odd.left_out] == [40]
    assert "no strategy" in odd.left_out[0][1]


def test_no_plan_anywhere() -> None:
    with pytest.raises(InfeasibleError, match="does not fit on 1x1"):
        against_devices(request("2x8:l4"), [1])
    with pytest.raises(InputError, match="no strategy"):
        against_devices(request("1x7:a100-80gb", Target.MEGATRON, "pp=1", "cp=1"), [7])
    with pytest.raises(StoppedError, match="before a plan was found"):
        against_devices(request("2x8:a100-80gb"), [8], deadline=Deadline(at=0.0))


# -- goals -------------------------------------------------------------------------------------------------------------


def test_goals_on_memory_are_the_ends(on_memory: Tradeoff) -> None:
    for goal, point in ((Goal.MIN_TIME, on_memory.points[0]), (Goal.MIN_MEMORY, on_memory.points[-1])):
        found = reach(on_memory.request, goal)
        assert found.chosen == 0
        assert found.points[0].plan == point.plan


def test_fewest_devices(on_devices: Tradeoff) -> None:
    steps = {point.devices: point.plan.step_time_s for point in on_devices.points}
    for longest, devices in ((steps[8] * 1.01, 8), (steps[8] * 0.99, 16), (steps[4] * 1.01, 4), (float("inf"), 4)):
        found = reach(on_devices.request, Goal.MIN_DEVICES, [4, 8, 16], longest_step_s=longest)
        assert found.chosen is not None
        assert found.points[found.chosen].devices == devices == max(point.devices for point in found.points)


def test_cheapest_number_of_devices(on_devices: Tradeoff) -> None:
    found = reach(on_devices.request, Goal.MIN_COST, [4, 8, 16])
    assert found.chosen is not None
    assert found.points[found.chosen].device_seconds == min(point.device_seconds for point in on_devices.points)
    quick = on_devices.points[-1].plan.step_time_s * 1.01
    found = reach(on_devices.request, Goal.MIN_COST, [4, 8, 16], longest_step_s=quick)
    assert found.chosen == 2


def test_no_step_is_short_enough(on_devices: Tradeoff) -> None:
    with pytest.raises(InfeasibleError) as raised:
        reach(on_devices.request, Goal.MIN_DEVICES, [4, 8], longest_step_s=1e-3)
    assert "on 8 devices" in raised.value.why
    assert raised.value.relaxations


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with --json."""

    def run_it(*arguments: str) -> Any:
        assert main([*arguments, "--json"]) == ExitCode.OK
        return json.loads(capsys.readouterr().out)

    return run_it


def test_json(answer: Callable[..., Any], on_memory: Tradeoff) -> None:
    data = answer(*MEMORY, "--points", "6", "--price-per-device-hour", "2")
    assert (data["schema_version"], data["status"], data["over"], data["goal"]) == (1, "optimal", "memory", None)
    assert [point["plan"] for point in data["points"]] == [point.plan.to_dict() for point in on_memory.points]
    for point in data["points"]:
        plan = point["plan"]
        for key in ("step_time_s", "objective_s", "bound_s", "peak_memory_bytes"):
            assert point[key] == plan[key]
        assert point["devices"] == 8
        assert point["cost_per_step"] == pytest.approx(8 * point["step_time_s"] / 1800)
    page = (ROOT / "docs/reference/frontier.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in [*data, *(f"points[].{key}" for key in data["points"][0])])


def test_json_of_a_goal(answer: Callable[..., Any]) -> None:
    data = answer(*DEVICES[:-2], "--devices", "4,8,16", "--min-devices", "--deadline", "1e5")
    assert (data["goal"], data["over"], data["chosen"]) == ("min-devices", "devices", 0)
    assert [point["devices"] for point in data["points"]] == [4]


def test_answers_are_the_same_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        assert main([*MEMORY, "--points", "4"]) == ExitCode.OK
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


READ = {
    "memory": [*MEMORY, "--points", "12"],
    "memory, all": [*MEMORY, "--all"],
    "devices": DEVICES,
    "devices with a price": [*DEVICES, "--price-per-device-hour", "12.5"],
    "any": [*MEMORY, "--points", "4", "--target", "any"],
    "fewest": [*DEVICES[:-2], "--min-devices", "--deadline", "60"],
    "cheapest": [*DEVICES[:-2], "--min-cost", "--price-per-device-hour", "2"],
    "fastest": [*MEMORY, "--min-time"],
    "leanest": [*MEMORY, "--min-memory"],
}


@pytest.mark.parametrize("name", READ)
def test_fits_eighty_columns(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colour off a terminal and with NO_COLOR; with colour the same text."""
    assert main(READ[name]) == ExitCode.OK
    plain = capsys.readouterr().out
    assert max(len(line) for line in plain.splitlines()) <= 80
    assert "\x1b" not in plain
    assert re.search(r"^Next ", plain, re.MULTILINE)
    assert re.search(r"^Proof ", plain, re.MULTILINE)
    if name in ("memory", "devices with a price"):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert main(READ[name]) == ExitCode.OK
        coloured = capsys.readouterr().out
        assert "\x1b[" in coloured
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_words_for_people(capsys: pytest.CaptureFixture[str], on_memory: Tradeoff) -> None:
    assert main([*MEMORY, "--points", "6"]) == ExitCode.OK
    text = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) s +([+-][\d.]+)%  (\S.*)$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [str(i) for i in range(1, 7)]
    for row, point in zip(rows, on_memory.points, strict=True):
        assert float(row[1]) == pytest.approx(point.plan.peak_memory_bytes / 2**30, abs=0.05)
        assert float(row[2]) == pytest.approx(point.plan.step_time_s, abs=0.005)
        assert row[4].startswith(f"pp{point.plan.pp} ")
    for label in ("Fastest", "How to read", "Leanest", "All"):
        assert re.search(rf"^{label} ", text, re.MULTILINE)


def test_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], on_memory: Tradeoff) -> None:
    table, picture = tmp_path / "new" / "f.csv", tmp_path / "f.svg"
    words = [*MEMORY, "--points", "6", "--csv", str(table), "--svg", str(picture)]
    assert main(words) == ExitCode.OK
    records = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert [float(record["step_time_s"]) for record in records] == [p.plan.step_time_s for p in on_memory.points]
    assert [int(record["peak_memory_bytes"].split(".")[0]) for record in records] == [
        int(point.plan.peak_memory_bytes) for point in on_memory.points
    ]
    assert {record["tp"] for record in records} <= {"1", "2", "4", "8"}
    assert picture.read_text(encoding="utf-8").count("<circle") == 6
    capsys.readouterr()
    table.unlink()
    assert main(words) == ExitCode.BAD_INPUT  # the picture is there
    assert "f.svg: is there already" in capsys.readouterr().err
    assert not table.exists()
    assert main([*words, "--force"]) == ExitCode.OK
    assert table.exists()


def test_every_point_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], on_memory: Tradeoff) -> None:
    folder = tmp_path / "out"
    assert main([*MEMORY, "--points", "6", "-o", str(folder)]) == ExitCode.OK
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["frontier.csv", *(f"point-{number:02d}" for number in range(1, 7))]
    for number, point in enumerate(on_memory.points, start=1):
        place = folder / f"point-{number:02d}"
        assert (place / "plan.json").read_text(encoding="utf-8") == point.plan.to_json()
        assert (place / "launch.sh").stat().st_mode & 0o111
        assert {path.name for path in place.iterdir()} - {"plan.json"} <= LAUNCH_FILES
    (folder / "point-02" / "pipeline_split.json").write_text("{}", encoding="utf-8")  # of an earlier plan
    assert main([*MEMORY, "--points", "6", "-o", str(folder), "--force"]) == ExitCode.OK
    assert not (folder / "point-02" / "pipeline_split.json").exists()


def test_force_leaves_no_points_of_another_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plans"
    assert main([*MEMORY, "--points", "3", "-o", str(folder)]) == ExitCode.OK
    (folder / "point-02" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main([*MEMORY, "--points", "2", "-o", str(folder), "--force"]) == ExitCode.OK
    assert sorted(path.name for path in folder.iterdir()) == ["frontier.csv", "point-01", "point-02"]
    assert (folder / "point-02" / "notes.txt").exists()
    assert main([*DEVICES, "--devices", "8", "-o", str(folder), "--force"]) == ExitCode.OK
    assert sorted(path.name for path in folder.iterdir()) == ["devices-8", "frontier.csv", "point-02"]
    assert [path.name for path in (folder / "point-02").iterdir()] == ["notes.txt"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--points", "1001"], "give at most 1000, or --all"),
        (["--price-per-device-hour", "-1"], "'-1' is not a price above zero"),
        (["--price-per-device-hour", "1e30"], "at most 1,000,000,000"),
    ],
)
def test_numbers_beyond_reason(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*MEMORY, *options])
    assert problem in capsys.readouterr().err


def test_a_goal_is_written_as_plan_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MEMORY, "--min-memory", "-o", str(tmp_path / "out")]) == ExitCode.OK
    assert {"plan.json", "launch.sh"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert f"bash{tmp_path}/out/launch.sh" in re.sub(r"\s+", "", capsys.readouterr().out)


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["frontier", "llama-2-70b", "--cluster", "1x1:a100-40gb", *JOB]
    assert main([*words, "--json"]) == ExitCode.INFEASIBLE
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["status"] == "infeasible"
    assert data["relaxations"]
    assert all(line in captured.err for line in data["relaxations"])
    assert main([*words, "--min-memory"]) == ExitCode.INFEASIBLE
    assert main([*DEVICES, "--min-cost", "--price-per-device-hour", "1", "--deadline", "0.01"]) == ExitCode.INFEASIBLE
    assert "--deadline of at least" in capsys.readouterr().err


WRONG = {
    "--deadline 3": "--deadline: without",
    "--min-time --deadline 3": "--deadline: without",
    "--min-cost": "--min-cost: needs the price",
    "--over devices --points 3": "--points: against devices",
    "--devices 4 --min-time": "keep all devices",
    "--over memory --min-devices": "keep all devices",
    "--devices 12": "12 devices: no part of",
    "--over devices --fix tp=3": "no strategy",
}


@pytest.mark.parametrize("words", WRONG)
def test_options_that_make_no_sense(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MEMORY, *shlex.split(words)]) == ExitCode.BAD_INPUT
    captured = capsys.readouterr()
    assert WRONG[words] in captured.err
    assert not captured.out


@pytest.mark.parametrize("words", ["--points 1", "--points x", "--devices 4,,8", "--min-time --min-memory"])
def test_options_that_do_not_parse(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*MEMORY, *shlex.split(words)])
    assert stop.value.code == ExitCode.BAD_INPUT
    assert "usage:" in capsys.readouterr().err


def test_no_time_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MEMORY, "--time-limit", "1e-6"]) == ExitCode.STOPPED
    assert "--time-limit" in capsys.readouterr().err


def test_what_was_found_in_time_is_kept(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    """Ctrl-C during the third point leaves two."""
    from uniap_tune.frontier.points import Frontier

    ask, calls = Frontier._ask, [0]

    def interrupted(self: Frontier, limit: float) -> Any:
        calls[0] += 1
        if calls[0] > 2:
            raise KeyboardInterrupt
        return ask(self, limit)

    monkeypatch.setattr(Frontier, "_ask", interrupted)
    data = answer(*MEMORY, "--all")
    assert (data["status"], data["complete"], len(data["points"])) == ("limit", False, 2)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_outputs_shown_are_like_those_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The same job, axes, columns and sentences; figures may move with the constants of the cost model."""
    page = (ROOT / "docs/reference/frontier.md").read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^\$ uniap-tune (frontier [^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    for command, output in shown:
        assert main(shlex.split(command)) == ExitCode.OK
        printed = capsys.readouterr().out
        for pattern in (
            r"^.*: step time against .*$",
            r"^step time, s",
            r"^ *(point|devices) .*plan *$",
            r"^Proof +\w+",
        ):
            lines = [[text.strip() for text in re.findall(pattern, each, re.MULTILINE)] for each in (output, printed)]
            assert lines[0] == lines[1]
        assert max(len(line) for line in output.splitlines()) <= 80
