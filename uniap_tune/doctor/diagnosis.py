"""The diagnosis of a setup: does it fit, where do time and memory go, what is wrong, which single changes help most."""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.breakdown import Breakdown, break_down
from uniap_tune.cost.model import CostModel
from uniap_tune.doctor.finding import Case, Finding, Limit, is_legal
from uniap_tune.doctor.findings import examine
from uniap_tune.doctor.options import options_of
from uniap_tune.doctor.setup import Option, Setup, difference, together
from uniap_tune.predict import Prediction, Run, predict

# A change must shorten the step by more than this to be worth a word [Empirical]: two runs of one configuration differ
# by as much.
LEAST_GAIN = 0.005
# How many changes are shown.
SHOWN = 3
# Where no single change is enough, so many of those that help most are tried with a second one.
_FIRST_OF_TWO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """A single change and what it brings.

    Attributes:
        setting: what is changed.
        title: for people, ``"tp 4 -> 8, dp 2 -> 1"``.
        edits: what to write.
        prediction: with the change.
        room_bytes: what is then left on the fullest stage.
        gain: part of today's step that it saves; below zero: that it adds.
    """

    setting: str
    title: str
    edits: tuple[str, ...]
    prediction: Prediction
    room_bytes: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The answer.

    Attributes:
        setup: what was looked at.
        limit: the memory it may use.
        broken: what the engine refuses or fails with, as (rule, sentence).
        run, breakdown: how it runs; ``None`` if it cannot.
        findings: what loses time or memory, the dearest first.
        improvements: single changes, best first: those that make it faster; those that make it fit, if it does not
            (two together where one is not enough); those that make it run, if it cannot.
        nearest: where no single change makes it fit, the one that leaves least missing.
    """

    setup: Setup
    limit: Limit
    broken: tuple[tuple[str, str], ...]
    run: Run | None
    breakdown: Breakdown | None
    findings: tuple[Finding, ...]
    improvements: tuple[Improvement, ...]
    nearest: Improvement | None

    @property
    def room_bytes(self) -> tuple[float, ...]:
        """For each stage, what is left; below zero: what is missing. Empty if it does not run."""
        return self.limit.room(self.breakdown.prediction) if self.breakdown is not None else ()

    @property
    def fits(self) -> bool | None:
        """The verdict, by what is expected; ``None`` if it does not run."""
        return self.limit.fits(self.breakdown.prediction) if self.breakdown is not None else None

    @property
    def is_certain(self) -> bool:
        """Whether the verdict holds over the whole band of the prediction."""
        if self.breakdown is None:
            return True
        prediction = self.breakdown.prediction
        return self.limit.surely_fits(prediction) or self.limit.surely_fails(prediction)

    @property
    def fullest(self) -> int:
        """The stage with the least room."""
        return self.room_bytes.index(min(self.room_bytes))


def limit_for(run: Run, memory_fraction: float | None = None) -> Limit:
    """The memory a run may use: all of its devices', unless a fraction is given here or in the cluster file."""
    fraction = memory_fraction or run.cluster.memory_fraction or 1.0
    costs = CostModel(run.model, run.cluster, run.job, run.capabilities, runtime=run.runtime)
    return Limit(memory_bytes=fraction * run.cluster.device.memory_bytes, band=costs.memory_band())


def diagnose(setup: Setup, *, memory_fraction: float | None = None, shown: int = SHOWN) -> Diagnosis:
    """Look at a setup.

    Args:
        setup: the configuration.
        memory_fraction: part of each device's memory it may use.
        shown: how many improvements.
    """
    if not setup.runs:
        return _not_running(setup, memory_fraction, shown)
    run = setup.run()
    limit = limit_for(run, memory_fraction)
    breakdown = break_down(run)
    case = Case(setup=setup, run=run, breakdown=breakdown, limit=limit)
    safe, nearest = _helpful(setup, limit, breakdown.prediction)
    return Diagnosis(
        setup=setup,
        limit=limit,
        broken=setup.broken,
        run=run,
        breakdown=breakdown,
        findings=examine(case),
        improvements=_best(safe, shown),
        nearest=nearest,
    )


def _not_running(setup: Setup, memory_fraction: float | None, shown: int) -> Diagnosis:
    """For a setup that the engine refuses: what would make it run."""
    options = [option for option in options_of(setup) if option.setup.runs and not option.setup.broken]
    runs = [(option, option.setup.run()) for option in options]
    limit = (
        limit_for(runs[0][1], memory_fraction)
        if runs
        else Limit(memory_bytes=setup.cluster.device.memory_bytes, band=0)
    )
    found = [_improvement(setup, option, limit, predict(run), None) for option, run in runs]
    return Diagnosis(
        setup=setup,
        limit=limit,
        broken=setup.broken,
        run=None,
        breakdown=None,
        findings=(),
        improvements=_best([x for x in found if limit.surely_fits(x.prediction)], shown),
        nearest=None,
    )


def _helpful(setup: Setup, limit: Limit, today: Prediction) -> tuple[list[Improvement], Improvement | None]:
    """The changes worth making, and the nearest miss where no single one is enough."""
    options = _legal(setup)
    found = [_improvement(setup, option, limit, predict(option.setup.run()), today) for option in options]
    if limit.fits(today):
        return [x for x in found if x.gain > LEAST_GAIN and _is_safe(limit, x, today)], None
    enough = [x for x in found if limit.surely_fits(x.prediction)]
    if enough or not found:
        return enough, None
    order = sorted(range(len(found)), key=lambda i: (-found[i].room_bytes, found[i].prediction.step_time_s))
    firsts: dict[str, Option] = {}
    for i in order:
        firsts.setdefault(options[i].setting, options[i])
    pairs = [
        together(first, second)
        for first in list(firsts.values())[:_FIRST_OF_TWO]
        for second in _legal(first.setup)
        if second.setting != first.setting
    ]
    both = [_improvement(setup, pair, limit, predict(pair.setup.run()), today) for pair in pairs]
    return [x for x in both if limit.surely_fits(x.prediction)], found[order[0]]


def _legal(setup: Setup) -> list[Option]:
    return [option for option in options_of(setup) if option.edits and is_legal(setup, option)]


def _improvement(
    setup: Setup, option: Option, limit: Limit, prediction: Prediction, today: Prediction | None
) -> Improvement:
    return Improvement(
        setting=option.setting,
        title=difference(setup, option.setup),
        edits=option.edits,
        prediction=prediction,
        room_bytes=min(limit.room(prediction)),
        gain=1 - prediction.step_time_s / today.step_time_s if today is not None else 0.0,
    )


def _is_safe(limit: Limit, change: Improvement, today: Prediction) -> bool:
    """Whether it fits with the error of the prediction, or takes no more than what runs today."""
    fuller = max(change.prediction.memory_bytes_per_stage) > max(today.memory_bytes_per_stage)
    return limit.surely_fits(change.prediction) or not fuller


def _best(changes: list[Improvement], shown: int) -> tuple[Improvement, ...]:
    """The fastest change of each setting, fastest first; of equals the one with more room."""
    order = sorted(changes, key=lambda x: (x.prediction.step_time_s, -x.room_bytes, x.title))
    kept: dict[str, Improvement] = {}
    for change in order:
        kept.setdefault(change.setting, change)
    return tuple(kept.values())[:shown]
