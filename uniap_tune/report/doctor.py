"""A diagnosis for people, in at most 80 columns; colour only on a terminal and never with NO_COLOR."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uniap_tune.breakdown import Breakdown
from uniap_tune.cost.parts import ACTIVATIONS, GRADIENTS, OPTIMIZER_STATES, PARAMETERS, WORKSPACE
from uniap_tune.doctor.diagnosis import Diagnosis, Improvement
from uniap_tune.doctor.finding import Finding
from uniap_tune.doctor.setup import SETTINGS, Setup, shown_settings
from uniap_tune.report.console import console, print_sentence
from uniap_tune.units import GIB, format_bytes, format_count, format_percent, format_seconds

_MOST_STAGES = 10
_LABEL = 15
_COLUMNS = {
    PARAMETERS: "params",
    GRADIENTS: "grads",
    OPTIMIZER_STATES: "optim",
    ACTIVATIONS: "activ",
    WORKSPACE: "rest",
}
_NOTABLE = 1e-3  # of a step
_NOTABLE_BYTES = 0.05 * GIB
_T = TypeVar("_T")


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The verdict, memory by stage, time by part, what is wrong, what to change."""
    out = console()
    setup = diagnosis.setup
    word, style = _verdict(diagnosis)
    title = Text(f"{setup.model.name} on {setup.cluster.name} with {setup.engine}: ", style="bold")
    out.print(title + Text(word, style=f"bold {style}"))
    out.print(textwrap.fill(", ".join(f"{name} {value}" for name, value in shown_settings(setup).items()), out.width))
    out.print()
    if diagnosis.breakdown is not None:
        _memory(out, diagnosis, diagnosis.breakdown)
        _time(out, diagnosis.breakdown)
    for _, sentence in diagnosis.broken:
        _row(out, "Broken", sentence)
    for label, item in _labelled("Findings", diagnosis.findings):
        _row(out, label, _finding_text(item, diagnosis))
    if not diagnosis.findings and not diagnosis.broken:
        _row(out, "Findings", "none: nothing is known that this configuration silently loses")
    _changes(out, diagnosis)
    for label, note in _labelled("Assumed", setup.notes):
        _row(out, label, note)
    _row(out, "Next", f"{_tuner(setup)} chooses all settings together, with a proof.")
    _row(out, "Not modelled", "Times and bytes come from an analytic cost model; nothing was measured.")


def _tuner(setup: Setup) -> str:
    """The command that plans what was looked at."""
    if setup.engine == "DeepSpeed":
        return "`deepspeed --autotune uniap` or `uniap-tune plan --target deepspeed`"
    return "`uniap-tune plan`" if setup.format == SETTINGS else "`uniap-tune tune`"


def _verdict(diagnosis: Diagnosis) -> tuple[str, str]:
    if diagnosis.fits is None:
        return "does not run", "red"
    word, style = ("fits", "green") if diagnosis.fits else ("does not fit", "red")
    if not diagnosis.is_certain:
        return f"{word}, but within the error of the prediction", "yellow"
    if diagnosis.fits and diagnosis.broken:
        return f"{word}, but breaks rules of {diagnosis.setup.engine}", "yellow"
    return word, style


def _memory(out: Console, diagnosis: Diagnosis, breakdown: Breakdown) -> None:
    prediction, stage, limit = breakdown.prediction, diagnosis.fullest, diagnosis.limit
    used, room = prediction.memory_bytes_per_stage[stage], diagnosis.room_bytes[stage]
    usable = limit.memory_bytes - prediction.overhead_bytes
    where = f"stage {stage}, the fullest," if len(breakdown.memory) > 1 else "every device"
    state = f"{format_bytes(room)} free" if room >= 0 else f"{format_bytes(-room)} too much"
    low, high = used / (1 + limit.band), used * (1 + limit.band)
    _row(
        out,
        "Memory",
        f"{where} needs {format_bytes(used)} of {format_bytes(usable)}: {state}. "
        f"4 of 5 runs like it need {low / GIB:.1f} to {high / GIB:.1f} GiB. "
        f"{format_bytes(prediction.overhead_bytes)} more are set aside for CUDA, NCCL and fragmentation.",
    )
    _stage_table(out, diagnosis, breakdown)
    if room < 0:
        parts = sorted(breakdown.memory[stage].items(), key=lambda item: -item[1])
        text = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts[:3])
        _row(out, "Takes most", text)


def _stage_table(out: Console, diagnosis: Diagnosis, breakdown: Breakdown) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("stage", "layers", *_COLUMNS.values(), "GiB", "room"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = _shown_stages(len(breakdown.memory), diagnosis.fullest)
    for before, stage in zip([-1, *shown], shown, strict=False):
        if stage > before + 1:
            table.add_row("…")
        memory, room = breakdown.memory[stage], diagnosis.room_bytes[stage]
        sizes = [f"{memory.get(part, 0.0) / GIB:.1f}" for part in _COLUMNS]
        total = f"{sum(memory.values()) / GIB:.1f}"
        left = Text(f"{room / GIB:.1f}", style="red" if room < 0 else "")
        table.add_row(str(stage), f"{breakdown.blocks[stage]:g}", *sizes, total, left)
    out.print()
    out.print(table)
    out.print()


def _shown_stages(count: int, fullest: int) -> list[int]:
    """All stages, or of many the outer ones and the fullest."""
    if count <= _MOST_STAGES:
        return list(range(count))
    return sorted({*range(_MOST_STAGES - 4), fullest, count - 2, count - 1})


def _time(out: Console, breakdown: Breakdown) -> None:
    prediction, step = breakdown.prediction, breakdown.prediction.step_time_s
    band = f"{format_seconds(prediction.step_time_low_s)} to {format_seconds(prediction.step_time_high_s)}"
    _row(
        out,
        "Time",
        f"{format_seconds(step)} a step ({band} in 4 of 5 runs like it), {format_count(breakdown.tokens_per_s)} "
        f"tokens/s, MFU {format_percent(breakdown.mfu)}",
    )
    parts = sorted(breakdown.time.items(), key=lambda item: -item[1])
    shown = [f"{part.replace('_', ' ')} {format_percent(s / step)}" for part, s in parts if s >= _NOTABLE * step]
    where = " (slowest stage)" if len(breakdown.memory) > 1 else ""
    _row(out, "", f"{', '.join(shown)}{where}")


def _finding_text(item: Finding, diagnosis: Diagnosis) -> str:
    first = item.sentence.partition(" ")[0]
    is_name = first.startswith("-") or "." in first or "_" in first
    text = (item.sentence if is_name else item.sentence[0].upper() + item.sentence[1:]) + "."
    if not item.edits:
        return text
    brings = _brings(item, diagnosis)
    return f"{text} Change: {'; '.join(item.edits)}" + (f" ({brings})" if brings else "")


def _brings(item: Finding, diagnosis: Diagnosis) -> str:
    """What the change brings; empty where it is nothing to speak of."""
    if diagnosis.breakdown is None or item.lost_s is None or item.lost_bytes is None:
        return ""
    share, freed = item.lost_s / diagnosis.breakdown.prediction.step_time_s, item.lost_bytes
    parts = []
    if abs(share) >= _NOTABLE:
        parts.append(f"{format_percent(abs(share))} {'faster' if share > 0 else 'slower'}")
    if abs(freed) >= _NOTABLE_BYTES:
        parts.append(f"{format_bytes(abs(freed))} {'freed' if freed > 0 else 'more memory'}")
    return ", ".join(parts)


def _changes(out: Console, diagnosis: Diagnosis) -> None:
    label = "Changes" if diagnosis.fits else "To make it fit" if diagnosis.fits is False else "To make it run"
    if diagnosis.nearest is not None:
        nearest = diagnosis.nearest
        left = f"still {format_bytes(-nearest.room_bytes)} too much" if nearest.room_bytes < 0 else "within the error"
        two = "; two together are:" if diagnosis.improvements else ""
        _row(out, label, f"no single change is enough ({nearest.title}: {left}){two}")
        label = ""
    for number, change in enumerate(diagnosis.improvements, start=1):
        _row(out, label if number == 1 else "", f"{number}. {_change_text(change, diagnosis)}")
        for edit in change.edits:
            _row(out, "", edit, indent=3)
    if diagnosis.improvements:
        return
    if diagnosis.fits:
        _row(out, label, "no single change makes it faster by more than the error of a measurement")
    elif diagnosis.fits is None:
        _row(out, label, f"no single change is enough: correct what is broken, or let {_tuner(diagnosis.setup)} do it")
    else:
        _row(out, label, "nor are two; `uniap-tune plan` says whether any plan fits, and what would help if none does")


def _change_text(change: Improvement, diagnosis: Diagnosis) -> str:
    seconds, free = format_seconds(change.prediction.step_time_s), f"{format_bytes(change.room_bytes)} free"
    if diagnosis.breakdown is None:
        return f"{change.title}: {seconds} a step, {free}"
    share = format_percent(abs(change.gain))
    if diagnosis.fits:
        return f"{change.title}: {share} faster, {seconds} a step, {free}"
    word = "less" if change.gain >= 0 else "more"
    return f"{change.title}: {free}, {seconds} a step, {share} {word} than above"


def _labelled(label: str, items: Sequence[_T]) -> Iterator[tuple[str, _T]]:
    """Items with the label before the first one."""
    for number, item in enumerate(items):
        yield label if number == 0 else "", item


def _row(out: Console, label: str, text: str, *, indent: int = 0) -> None:
    print_sentence(out, label, text, label_width=_LABEL, indent=indent)
