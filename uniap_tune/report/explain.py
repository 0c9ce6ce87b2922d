"""An explanation for people, on stdout: 80 columns, in which no figure is parted from its unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from uniap_tune.assemble import OPTIMIZER_STEP, RESERVED, RESHARD
from uniap_tune.breakdown import BUBBLE, SEND
from uniap_tune.cost.parts import (
    ACTIVATIONS,
    BUFFERS,
    COMPUTE,
    CP_COMM,
    DP_COMM,
    EP_COMM,
    GRADIENTS,
    OPTIMIZER,
    OPTIMIZER_STATES,
    PARAMETERS,
    RECOMPUTE,
    TP_COMM,
    WORKSPACE,
    ZERO_COMM,
)
from uniap_tune.explain.explanation import Explanation, knob_values
from uniap_tune.explain.memory_price import MemoryStep
from uniap_tune.explain.sensitivity import BATCH, Sensitivity
from uniap_tune.explain.summary import NOTABLE, PART_NAMES, Alternative, grid, time_shares
from uniap_tune.explain.whatif import Verdict, WhatIf
from uniap_tune.plan import Plan
from uniap_tune.prose import wrap
from uniap_tune.report.console import WIDTH, console, layers_text, print_sentence, stage_numbers
from uniap_tune.report.plan import print_verdict
from uniap_tune.strategy import CAPABILITIES, Target
from uniap_tune.units import GIB, format_bytes, format_count, format_percent, format_seconds

_MOST_PARTS = 3  # of memory
_MOST_CHANGES = 4  # of the parts of a step

# What makes a part of the step shorter.
_REMEDIES: Mapping[str, str] = {
    COMPUTE: "a larger micro-batch, a narrower format",
    RECOMPUTE: "more memory a device",
    TP_COMM: "a smaller tp, faster links inside a node",
    CP_COMM: "a smaller cp, faster links",
    EP_COMM: "a smaller ep, faster links",
    ZERO_COMM: "a lower ZeRO stage, larger micro-batches",
    DP_COMM: "a larger batch, a faster network",
    RESHARD: "one strategy for all layers",
    SEND: "fewer stages, a faster network",
    BUBBLE: "more micro-batches, fewer stages",
    OPTIMIZER: "more replicas, which share it from ZeRO 1 on",
}
_MEMORY_COLUMNS: Mapping[str, str] = {
    PARAMETERS: "param",
    GRADIENTS: "grad",
    OPTIMIZER_STATES: "optim",
    ACTIVATIONS: "activ",
    WORKSPACE: "work",
    BUFFERS: "buffer",
    OPTIMIZER_STEP: "update",
    RESERVED: "reserve",
}


def print_explanation(explanation: Explanation) -> None:
    """The plan, where its time and memory go, and what anything else would cost."""
    out = console()
    print_verdict(out, explanation.planning)
    _time(out, explanation.plan)
    _memory(out, explanation.plan)
    for label, text in sentences(explanation):
        print_sentence(out, label, text)
    _sensitivities(out, explanation)


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_table(out: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells under titles; a column whose title ends in a colon has texts, any other has figures.

    The last column is folded at 80 columns if it has texts.
    """
    names = [title.removesuffix(":") for title in titles]
    widths = [max(len(row[i]) for row in (names, *rows) if i < len(row)) for i in range(len(titles))]
    last = WIDTH - sum(width + 1 for width in widths[:-1])

    def lines(row: Sequence[str]) -> Iterator[str]:
        cells = [
            cell.ljust(width) if title.endswith(":") else cell.rjust(width)
            for title, cell, width in zip(titles, row, widths, strict=False)
        ]
        if len(row) < len(titles) or not titles[-1].endswith(":"):
            yield " ".join(cells).rstrip()
            return
        head = " ".join(cells[:-1])
        for number, text in enumerate(wrap(row[-1], last) or [""]):
            yield f"{head if number == 0 else ' ' * len(head)} {text}".rstrip()

    for number, row in enumerate((names, *rows)):
        for line in lines(row):
            out.print(Text(line, style="bold" if number == 0 else ""))
    out.print()


def _time(out: Console, plan: Plan) -> None:
    step = plan.step_time_s
    shares = sorted(time_shares(plan).items(), key=lambda item: -item[1])
    shown = [(name, seconds) for name, seconds in shares if seconds >= NOTABLE / 2 * step]
    interleaves = CAPABILITIES[Target(plan.target)].interleaving
    remedies = {**_REMEDIES, **({BUBBLE: "more micro-batches, more virtual stages"} if interleaves else {})}
    rows = [(PART_NAMES[name], *_figures(seconds, step), remedies[name]) for name, seconds in shown]
    rest = step - sum(seconds for _, seconds in shown)
    if rest > 1e-9 * step:
        rows.append(("the rest", *_figures(rest, step), ""))
    _print_table(out, ("time:", "seconds", "part", "shrinks with:"), [*rows, ("a step", *_figures(step, step), "")])


def _figures(seconds: float, step: float) -> tuple[str, str]:
    """Seconds, to four digits of those of a step, and the part of it."""
    digits = max(0, 3 - math.floor(math.log10(step)))
    return f"{seconds:.{digits}f}", format_percent(seconds / step)


def _memory(out: Console, plan: Plan) -> None:
    parts = [name for name in _MEMORY_COLUMNS if any(stage.memory.get(name) for stage in plan.stages)]
    rows = []
    for i in stage_numbers(plan.pp):
        if i is None:
            rows.append(["…"])
            continue
        stage = plan.stages[i]
        sizes = [f"{stage.memory.get(name, 0.0) / GIB:.1f}" for name in parts]
        total = f"{stage.peak_bytes / GIB:.1f}"
        rows.append([str(i), layers_text(stage), *sizes, total, f"{stage.peak_bytes / plan.memory_limit_bytes:.0%}"])
    _print_table(out, ("stage", "layers", *(_MEMORY_COLUMNS[name] for name in parts), "GiB", "used"), rows)


def _sensitivities(out: Console, explanation: Explanation) -> None:
    rows = []
    for item in explanation.sensitivities:
        name = f"{item.factor:g} x {item.changed}"
        if item.plan is None:
            rows.append((name, item.value, "-", "-", item.why_none))
        else:
            figures = (format_count(item.plan.tokens_per_s), f"{item.faster:+.1%}")
            rows.append((name, item.value, *figures, _changed_knobs(item, item.plan, explanation.plan)))
    if rows:
        out.print()
        _print_table(out, ("if there were:", "which is", "tokens/s", "change", "best plan then:"), rows)


def _changed_knobs(item: Sensitivity, other: Plan, plan: Plan) -> str:
    """Where the plan differs: ``"pp 4 -> 1, zero 1 -> 3"``. The number of micro-batches follows the batch."""
    found, ours = knob_values(other), knob_values(plan)
    if "tp" not in found or "tp" not in ours:  # layers differ
        return "the same" if other.strategies == plan.strategies else _described(other)
    changes = [
        f"{knob} {ours[knob]} -> {value}"
        for knob, value in found.items()
        if value != ours[knob] and not (knob == "microbatches" and item.changed == BATCH)
    ]
    return ", ".join(changes) or "the same"


# -- sentences ---------------------------------------------------------------------------------------------------------


def sentences(explanation: Explanation) -> Iterator[tuple[str, str]]:
    """Labels and texts, in the order of the report."""
    plan = explanation.plan
    for answer in explanation.why_not:
        asked = ", ".join(f"{knob} {value}" for knob, value in answer.asked.items())
        yield "Why not", f"{asked}: {_verdict_text(answer, plan)}"
    yield "Ideal", _ideal(explanation)
    yield from _more_memory(explanation)
    for label, other in (("Runner-up", explanation.runner_up), ("Other grid", explanation.other_grid)):
        if other is not None and (label == "Runner-up" or other is not explanation.runner_up):
            yield label, f"{_cost(other)}, {_described(other.plan)}{_because(other)}."
    if explanation.runner_up is None and explanation.is_complete:
        yield "Runner-up", "None: no other configuration fits."
    for restriction in explanation.restrictions:
        yield "Restriction", _restriction(restriction.option, restriction.without)
    for target, price in explanation.targets.items():
        cost = "has no plan for this job" if price is None else f"costs {format_percent(price)} at its best"
        yield "Engine", f"--target {target} {cost}."
    if not explanation.is_complete:
        yield "Left out", "The time was over before every question was answered; --time-limit allows more."


def _ideal(explanation: Explanation) -> str:
    compute = time_shares(explanation.plan)[COMPUTE]
    ideal = explanation.ideal_s
    return (
        f"{format_seconds(ideal)} a step is the model's arithmetic at the devices' peak; no plan is faster. "
        f"Kernels here reach {format_percent(ideal / compute)} of the peak."
    )


def _more_memory(explanation: Explanation) -> Iterator[tuple[str, str]]:
    memory, plan = explanation.memory, explanation.plan
    if memory is None:
        return
    if memory.unlimited is None:
        yield "Memory", "It does not bind: with all the memory in the world this plan is as fast as any."
        return
    limit, device = plan.memory_limit_bytes, explanation.planning.request.cluster.device.memory_bytes
    if memory.following is not None:
        step = memory.following
        more = _rounded_up(step.limit_bytes - limit)
        text = f"It binds. {more} more on every device would allow {_change(step.other)}, {_described(step.other.plan)}"
        yield "Memory", f"{text}; {_stages(step)} it."
        if step.limit_bytes <= device:
            fraction = math.ceil(1000 * step.limit_bytes / device) / 1000
            yield (
                "",
                f"The device has that much: --memory-fraction {fraction:g} takes it from the safety margin.",
            )
    free = memory.unlimited
    head = "The most that memory can buy is" if memory.following is not None else "It binds. What more would buy is"
    size = format_bytes(free.limit_bytes)
    yield (
        ("" if memory.following else "Memory"),
        f"{head} {_change(free.other)}, with {size}: {_described(free.other.plan)}.",
    )


def _rounded_up(count: float) -> str:
    """Bytes that are enough, to a tenth of a GiB."""
    return f"{math.ceil(count / GIB * 10) / 10:.1f} GiB"


def _stages(step: MemoryStep) -> str:
    first, last = step.stages[0], step.stages[-1]
    if first == last:
        return f"stage {first} needs"
    return f"stages {first} to {last} need" if len(step.stages) == last - first + 1 else "some stages need"


def _described(plan: Plan) -> str:
    """The grid; where layers differ also what most blocks do."""
    if plan.uniform() is not None:
        return grid(plan)
    blocks = [s.describe() for stage in plan.stages for s in stage.block_strategies()]
    most = max(dict.fromkeys(blocks), key=blocks.count)
    return f"{grid(plan)} ({blocks.count(most)} of {len(blocks)} blocks: {most})"


def _change(other: Alternative) -> str:
    """``"26.65 s a step (-1.4%)"``."""
    return f"{format_seconds(other.plan.step_time_s)} a step ({other.slower:+.1%})"


def _cost(other: Alternative) -> str:
    """What taking the other plan costs, and its step."""
    step = f"{format_seconds(other.plan.step_time_s)} a step"
    if abs(other.slower) < NOTABLE / 2:
        return f"Costs nothing: {step}"
    if other.slower > 0:
        return f"Costs {format_percent(other.slower)}: {step}"
    if other.slower_proven < 0:
        return f"Saves {format_percent(-other.slower)}: {step}"
    return (
        f"Saves {format_percent(-other.slower)} in the simulation, costs {format_percent(other.slower_proven)} in the "
        f"closed form that is proven (plan --rank simulated goes by the former): {step}"
    )


def _because(other: Alternative) -> str:
    """The parts that differ most: ``"; TP communication +1.77 s, compute -0.13 s"``."""
    parts = sorted(other.parts.items(), key=lambda item: -abs(item[1]))
    notable = NOTABLE / 2 * other.plan.step_time_s
    told = [f"{PART_NAMES[name]} {_signed(seconds)}" for name, seconds in parts if abs(seconds) >= notable]
    return f"; {', '.join(told[:_MOST_CHANGES])}" if told else ""


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{format_seconds(abs(seconds))}"


def _verdict_text(answer: WhatIf, plan: Plan) -> str:
    other = answer.other
    if answer.verdict is Verdict.ILLEGAL:
        return f"not legal: {'; '.join(answer.reasons)}."
    if answer.verdict is Verdict.OPEN or other is None:
        return "not solved in the time given."
    if answer.verdict is Verdict.SAME:
        return "that is what the plan does."
    if answer.verdict is Verdict.TOO_LARGE:
        return _too_large(answer, other, plan)
    text = _cost(other)
    text = f"{text[0].lower()}{text[1:]}, {_described(other.plan)}{_because(other)}."
    if other.slower < 0 and other.slower_proven < 0:
        fix = " ".join(f"--fix {knob}={value}" for knob, value in answer.asked.items())
        text += f" The search leaves it out, by default or by a restriction; {fix} asks for it."
    return text


def _too_large(answer: WhatIf, other: Alternative, plan: Plan) -> str:
    stage = other.plan.stages[answer.stage or 0]
    parts = sorted(stage.memory.items(), key=lambda item: -item[1])[:_MOST_PARTS]
    largest = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts)
    return (
        f"stage {answer.stage} exceeds the {format_bytes(plan.memory_limit_bytes)} by {_rounded_up(answer.over_bytes)} "
        f"even in the leanest plan, {_described(other.plan)}. It holds {largest}."
    )


def _restriction(option: str, without: Alternative) -> str:
    if without.slower > -NOTABLE / 2:
        return f"{option} costs nothing."
    cost, step = 1 / (1 + without.slower) - 1, format_seconds(without.plan.step_time_s)
    return f"{option} costs {format_percent(cost)}: without it {step} a step, {_described(without.plan)}."
