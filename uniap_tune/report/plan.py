"""The answer of ``plan`` for people: verdict, stages, what binds, the runner-up, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uniap_tune.cost.parts import ACTIVATIONS, GRADIENTS, OPTIMIZER_STATES, PARAMETERS
from uniap_tune.explain.summary import Binding, bubble_fraction, grid, summarize_strategies, time_shares
from uniap_tune.plan import Plan, Stage
from uniap_tune.planner import Planning
from uniap_tune.prose import wrap
from uniap_tune.report.console import WIDTH, console, layers_text, print_sentence, stage_numbers
from uniap_tune.units import GIB, format_count, format_percent, format_seconds

_MEMORY_COLUMNS = {PARAMETERS: "par", GRADIENTS: "grad", OPTIMIZER_STATES: "opt", ACTIVATIONS: "act"}


def print_planning(
    planning: Planning,
    prices: Mapping[str, float | None],
    binding: Binding | None,
    *,
    output: Path | None,
    shown: int,
    next_command: str,
) -> None:
    """The answer of ``plan``: verdict, stages, what binds, the runner-up, what is left out, what to do next."""
    out = console()
    plan = planning.plan
    print_verdict(out, planning)
    _stage_table(out, plan)
    print_sentence(out, "Time", _time_sentence(plan))
    if binding is not None:
        print_sentence(out, "Binds", binding.sentence)
    for number, other in enumerate(planning.plans[1 : max(2, shown)], start=2):
        label = "Runner-up" if number == 2 else f"No. {number}"
        print_sentence(out, label, f"{_slower(other, plan)}: {grid(other)}")
    if len(planning.plans) == 1:
        finished = plan.status == "optimal"
        print_sentence(
            out, "Runner-up", "none: no other configuration fits" if finished else "not found in the time given"
        )
    for target, price in prices.items():
        cost = "cannot run this model in this memory" if price is None else f"{format_percent(price)} slower at best"
        print_sentence(out, target.capitalize(), cost)
    print_sentence(out, "Proof", _proof(planning))
    print_sentence(out, "Not modelled", " ".join(plan.assumptions))
    if output is not None:
        print_sentence(out, "Written", f"{output}/")
    print_sentence(out, "Next", next_command)


def print_verdict(out: Console, planning: Planning) -> None:
    """What was planned for what, its time, its memory and its grid."""
    plan, request = planning.plan, planning.request
    state = "optimal" if plan.status == "optimal" else f"stopped at a gap of {format_percent(plan.gap)}"
    for line in wrap(f"{request.model.name} on {request.cluster.name} with {plan.target}: {state}", WIDTH):
        out.print(Text(line, style="bold"))
    summary = (
        f"{format_seconds(plan.step_time_s)} a step, {format_count(plan.tokens_per_s)} tokens/s, "
        f"MFU {format_percent(plan.mfu)}, {plan.peak_memory_bytes / GIB:.1f} of "
        f"{plan.memory_limit_bytes / GIB:.1f} GiB"
    )
    for text in (summary, grid(plan)):
        for line in wrap(text, WIDTH):
            out.print(line)
    out.print()


def _stage_table(out: Console, plan: Plan) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stage", justify="right")
    table.add_column("layers", justify="right")
    table.add_column("strategy", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    for title in _MEMORY_COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("rest", justify="right", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("full", justify="right", no_wrap=True)
    for i in stage_numbers(plan.pp):
        table.add_row(*(["…"] if i is None else _stage_row(i, plan.stages[i], plan)))
    out.print(table)
    out.print()


def _stage_row(i: int, stage: Stage, plan: Plan) -> list[str]:
    runs = summarize_strategies(stage)
    text = runs[0][1] if len(runs) == 1 else "\n".join(f"{count}x {strategy}" for count, strategy in runs)
    known = [stage.memory.get(name, 0.0) for name in _MEMORY_COLUMNS]
    rest = stage.peak_bytes - sum(known)
    sizes = [f"{size / GIB:.1f}" for size in (*known, rest, stage.peak_bytes)]
    share = f"{stage.peak_bytes / plan.memory_limit_bytes:.0%}"
    return [str(i), layers_text(stage), text, format_seconds(stage.time_s), *sizes, share]


def _time_sentence(plan: Plan) -> str:
    shares = sorted(time_shares(plan).items(), key=lambda item: -item[1])
    parts = [
        f"{name.replace('_', ' ')} {format_percent(value / plan.step_time_s)}"
        for name, value in shares
        if value >= 0.001 * plan.step_time_s
    ]
    text = ", ".join(parts) + " of a step on the slowest stage"
    if plan.pp > 1:
        text += f"; stages idle {format_percent(bubble_fraction(plan))} on average"
    return text


def _slower(other: Plan, best: Plan) -> str:
    difference = other.objective_s / best.objective_s - 1
    return "equal" if difference < 1e-9 else f"{format_percent(difference)} slower"


def _proof(planning: Planning) -> str:
    pairs = planning.result.pairs
    counts = {outcome: sum(pair.outcome == outcome for pair in pairs) for outcome in ("solved", "pruned", "infeasible")}
    return (
        f"gap {planning.result.gap:.1e} over {len(pairs)} (stages, micro-batches) pairs: "
        f"{counts['solved']} with a plan, {counts['pruned']} pruned by bounds, {counts['infeasible']} do not fit"
    )
