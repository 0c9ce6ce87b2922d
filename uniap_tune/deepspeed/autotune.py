"""``--autotune uniap``: understand the command, plan, check, write, and on request start the training."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniap_tune.adapters import deepspeed as ds_json
from uniap_tune.deadline import Deadline
from uniap_tune.deepspeed import launch
from uniap_tune.deepspeed.check import Case, check_cases
from uniap_tune.deepspeed.understand import Understanding, results_folder, understand
from uniap_tune.errors import InfeasibleError, InputError
from uniap_tune.explain.summary import grid
from uniap_tune.files import write_files
from uniap_tune.plan import Plan, plan_from_dict
from uniap_tune.planner import run as run_planner
from uniap_tune.render.deepspeed import deepspeed_config, pipeline_split
from uniap_tune.spec import Recompute
from uniap_tune.units import GIB, format_count, format_percent, format_seconds

PLAN, CONFIG, COMMAND, SUMMARY, SPLIT = (
    "plan.json",
    "ds_config_optimal.json",
    "cmd_optimal.txt",
    "summary.txt",
    "pipeline_split.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A plan and what becomes of the user's files with it."""

    plan: Plan
    resumed: bool
    config: Mapping[str, Any]
    changes: tuple[ds_json.Change, ...]
    command: launch.Command
    environment: Mapping[str, str]


def run(runner: Any, launcher: Any, argv: Sequence[str], *, device_count: Callable[[], int]) -> int:
    """Plan for a ``deepspeed`` command, and with ``--autotuning run`` train.

    Args:
        runner: DeepSpeed's launcher module.
        launcher: what its parser made of the command.
        argv: all words after ``deepspeed``.
        device_count: counts this machine's devices.

    Returns:
        The exit code: 0, or that of the training.

    Raises:
        TuneError: no plan, with what to do about it.
    """
    started = time.monotonic()
    command = launch.take_apart(
        argv,
        launcher.user_script,
        launcher.user_args,
        is_module=launcher.module,
        is_program=launcher.no_python,
    )
    launches = launcher.autotuning == "run"
    known = understand(command, launcher, runner, os.environ, device_count=device_count, launches=launches)
    folder = results_folder(known.values, str(known.config.path)).absolute()
    outcome = _plan(known, command, folder, Deadline.after(known.options.max_seconds))
    limit = known.options.max_seconds
    verdict = _check(known, outcome, None if limit is None else max(limit - (time.monotonic() - started), 0.0))
    summary = summarize(known, outcome, verdict, folder)
    _write(folder, known, outcome, summary)
    sys.stdout.write(summary)
    sys.stdout.flush()
    if not launches:
        return 0
    sys.stdout.write("\nstarting the training\n")
    sys.stdout.flush()
    return launch.start(outcome.command.words, outcome.environment)


def _plan(known: Understanding, command: launch.Command, folder: Path, deadline: Deadline) -> Outcome:
    request = known.request
    found = _earlier(folder / PLAN, request.describe()["hash"])
    try:
        plan = found or run_planner(request, deadline=deadline).plan
    except InfeasibleError as error:  # what the script cannot do has a part in it
        limits = "; ".join(f"{name}: {text}" for name, text in known.notes if name in ("script", "recompute", "tensor"))
        raise InfeasibleError(
            error.what, why=f"{error.why} ({limits})", fix=error.fix, relaxations=error.relaxations
        ) from error
    recompute = any(s.recompute is Recompute.FULL for s in plan.strategies)
    planned = deepspeed_config(plan, request.model, request.job)
    if known.pipeline:
        planned.setdefault("pipeline", {"activation_checkpoint_interval": int(recompute), "use_reentrant": False})
    config = ds_json.rewrite(known.values, planned, trainer=known.trainer)
    changed = launch.planned_command(
        command,
        known.config,
        folder / CONFIG,
        batch=(plan.micro_batch_size, plan.num_microbatches),
        recompute=recompute,
        trainer=known.trainer,
    )
    environment: dict[str, str] = {}
    if known.pipeline:
        environment = launch.plan_environment(folder / SPLIT)
        if not launch.script_mentions(command, "pipeline_module") and not command.is_program:
            changed = launch.through_worker(changed)
    return Outcome(
        plan=plan,
        resumed=found is not None,
        config=config,
        changes=ds_json.differences(known.values, config),
        command=changed,
        environment=environment,
    )


def _earlier(path: Path, wanted: str) -> Plan | None:
    """The proven plan of an earlier run for exactly these inputs."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        plan = plan_from_dict(data, str(path))
    except (OSError, ValueError, AttributeError, InputError):
        return None  # none, or of another version: it is planned again
    return plan if plan.inputs.get("hash") == wanted and plan.status == "optimal" else None


def case_of(known: Understanding, outcome: Outcome) -> Case:
    """What to try on DeepSpeed; the Trainer's ``"auto"`` values as it would fill them in."""
    plan = outcome.plan
    config = dict(outcome.config)
    if known.trainer:
        config |= {"train_micro_batch_size_per_gpu": plan.micro_batch_size}
        config |= {"gradient_accumulation_steps": plan.num_microbatches}
        config.pop("train_batch_size", None)
    split = pipeline_split(plan) if known.pipeline else None
    return Case(
        config=config,
        world_size=known.request.cluster.num_devices,
        layers=len(plan.strategies),
        parts=tuple(split["parts"]) if split else (),
    )


def _check(known: Understanding, outcome: Outcome, seconds: float | None) -> str:
    """What DeepSpeed says to the plan, one sentence.

    Raises:
        InputError: it refuses it.
    """
    if not known.options.check or seconds == 0.0:
        return "not tried on DeepSpeed" + (": the time is up" if seconds == 0.0 else ": uniap.check is false")
    verdict = check_cases([case_of(known, outcome)], timeout=seconds)[0]
    if verdict.refused:
        raise InputError(
            f"DeepSpeed refuses {known.config.path} with the plan written into it",
            why=verdict.reason,
            fix='correct the JSON; "check": false in the uniap block goes on regardless',
        )
    return verdict.sentence


def _write(folder: Path, known: Understanding, outcome: Outcome, summary: str) -> None:
    files = {
        PLAN: outcome.plan.to_json(),
        CONFIG: json.dumps(outcome.config, indent=2) + "\n",
        COMMAND: outcome.command.text(outcome.environment) + "\n",
        SUMMARY: summary,
    }
    if known.pipeline:
        files[SPLIT] = json.dumps(pipeline_split(outcome.plan), indent=2) + "\n"
    overwrite = ds_json.section(known.values, "autotuning", str(known.config.path)).get("overwrite", True)
    if overwrite is False and not outcome.resumed and (folder / PLAN).exists():
        raise InputError(
            f"{folder}: has the plan of another job", why="autotuning.overwrite is false", fix="use another results_dir"
        )
    write_files(folder, files, force=True)


def summarize(known: Understanding, outcome: Outcome, verdict: str, folder: Path) -> str:
    """What was understood, the plan, and every change, for people."""
    plan = outcome.plan
    proof = "proven optimal" if plan.status == "optimal" else f"stopped at a gap of {format_percent(plan.gap)}"
    lines = ["uniap-tune understood", *_table(known.notes), "", "uniap-tune plans"]
    rows = [
        ("grid", grid(plan)),
        ("step", f"{format_seconds(plan.step_time_s)} predicted, {format_count(plan.tokens_per_s)} tokens/s, {proof}"),
        ("memory", f"{plan.peak_memory_bytes / GIB:.1f} of {plan.memory_limit_bytes / GIB:.1f} GiB predicted"),
        ("batch", _batch_sentence(plan)),
    ]
    if plan.pp > 1:
        rows.append(("stages", " | ".join(str(len(stage.layers)) for stage in plan.stages) + " layers"))
    if outcome.resumed:
        rows.append(("resumed", f"the plan of {folder / PLAN}, made from the same inputs"))
    rows.append(("DeepSpeed", verdict))
    lines += [*_table(rows), "", f"changes to {known.config.path} (~ changed, + added, - removed)"]
    lines += [f"  {change}" for change in outcome.changes] or ["  none"]
    lines += ["", f"written to {folder}/: {CONFIG}, {COMMAND}, {PLAN}, {SUMMARY}"]
    lines += ["run it with", f"  {outcome.command.text(outcome.environment)}", ""]
    return "\n".join(lines)


def _batch_sentence(plan: Plan) -> str:
    strategy = plan.strategies[0]
    total = plan.micro_batch_size * plan.num_microbatches * strategy.dp
    return f"{total} = {plan.micro_batch_size} a micro-batch x {plan.num_microbatches} x {strategy.dp} data-parallel"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]
