"""What a finding is, and the list of all of them: one function each, registered under its own name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from uniap_tune.breakdown import Breakdown
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.setup import Option, Setup
from uniap_tune.predict import Prediction, Run, predict

# What a finding is about.
OVERLAP, WASTE, RISK = "overlap", "waste", "risk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Memory of a device that may be used, overhead included, and the relative half-width of the band of peaks."""

    memory_bytes: float
    band: float

    def room(self, prediction: Prediction) -> tuple[float, ...]:
        """For each stage, what is left at its peak; below zero: what is missing."""
        usable = self.memory_bytes - prediction.overhead_bytes
        return tuple(usable - held for held in prediction.memory_bytes_per_stage)

    def fits(self, prediction: Prediction) -> bool:
        """Whether every stage has room, by what is expected."""
        return min(self.room(prediction)) >= 0

    def surely_fits(self, prediction: Prediction) -> bool:
        """Whether it fits at the upper end of the band too."""
        held = max(prediction.memory_bytes_per_stage) * (1 + self.band)
        return held + prediction.overhead_bytes <= self.memory_bytes

    def surely_fails(self, prediction: Prediction) -> bool:
        """Whether it does not fit at the lower end of the band either."""
        held = max(prediction.memory_bytes_per_stage) / (1 + self.band)
        return held + prediction.overhead_bytes > self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a finding looks at: a setup that runs, priced."""

    setup: Setup
    run: Run
    breakdown: Breakdown
    limit: Limit

    @property
    def prediction(self) -> Prediction:
        """What it takes."""
        return self.breakdown.prediction

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """tp, dp, cp and the ZeRO stage of its layers."""
        strategy = self.run.chunks[0][0].strategy
        return strategy.tp, strategy.dp, strategy.cp, strategy.zero

    def is_better(self, option: Option) -> bool:
        """Whether an option is legal, surely fits, and is not slower."""
        if not is_legal(self.setup, option):
            return False
        found = predict(option.setup.run())
        return self.limit.surely_fits(found) and found.step_time_s <= self.prediction.step_time_s

    def best(self, options: list[Option]) -> Option | None:
        """The fastest of those that are better."""
        better = [option for option in options if self.is_better(option)]
        return min(better, key=lambda option: predict(option.setup.run()).step_time_s, default=None)


def is_legal(before: Setup, option: Option) -> bool:
    """Whether the engine takes an option: it breaks no rule that was not broken before."""
    known = {name for name, _ in before.broken}
    return option.setup.runs and all(name in known for name, _ in option.setup.broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What a check has found. ``remedy``: the change that removes it, where it is one that can be priced."""

    sentence: str
    remedy: Option | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A finding with what it costs.

    Attributes:
        name, kind: which check, and what it is about.
        edits: what to write to remove it; empty where it takes more than that.
        lost_s: seconds of a step that it costs; ``None`` where they cannot be predicted.
        lost_bytes: bytes of the fullest device that it costs.
    """

    name: str
    kind: str
    sentence: str
    edits: tuple[str, ...] = ()
    lost_s: float | None = None
    lost_bytes: float | None = None


_Own = TypeVar("_Own", MegatronSetup, DeepSpeedSetup)
Check = Callable[[Case], Advice | None]
EngineCheck = Callable[[Case, _Own], Advice | None]


@dataclass(frozen=True, slots=True)
class Known:
    """A registered check. ``engine``: whose setups it looks at, or ``any``; ``meaning``: what it looks for."""

    name: str
    kind: str
    engine: str
    meaning: str
    check: Check


FINDINGS: list[Known] = []


def finding(kind: str) -> Callable[[Check], Check]:
    """Registers a check for every engine; its docstring says what it looks for."""

    def register(check: Check) -> Check:
        FINDINGS.append(Known(check.__name__, kind, "any", (check.__doc__ or "").strip(), check))
        return check

    return register


def megatron_finding(kind: str) -> Callable[[EngineCheck[MegatronSetup]], EngineCheck[MegatronSetup]]:
    """Registers a check for Megatron's arguments."""
    return _of_engine(MegatronSetup, "Megatron", kind)


def deepspeed_finding(kind: str) -> Callable[[EngineCheck[DeepSpeedSetup]], EngineCheck[DeepSpeedSetup]]:
    """Registers a check for a DeepSpeed JSON."""
    return _of_engine(DeepSpeedSetup, "DeepSpeed", kind)


def _of_engine(own: type[_Own], engine: str, kind: str) -> Callable[[EngineCheck[_Own]], EngineCheck[_Own]]:
    def register(check: EngineCheck[_Own]) -> EngineCheck[_Own]:
        def only(case: Case) -> Advice | None:
            return check(case, case.setup) if isinstance(case.setup, own) else None

        FINDINGS.append(Known(check.__name__, kind, engine, (check.__doc__ or "").strip(), only))
        return check

    return register


def examine(case: Case) -> tuple[Finding, ...]:
    """Every finding about a case, those that cost most time first."""
    found = []
    for known in FINDINGS:
        advice = known.check(case)
        if advice is not None:
            found.append(_priced(known, advice, case))
    return tuple(sorted(found, key=lambda item: -(item.lost_s or 0.0)))


def _priced(known: Known, advice: Advice, case: Case) -> Finding:
    remedy = advice.remedy
    if remedy is None or not remedy.setup.runs:
        return Finding(name=known.name, kind=known.kind, sentence=advice.sentence)
    after = predict(remedy.setup.run())
    return Finding(
        name=known.name,
        kind=known.kind,
        sentence=advice.sentence,
        edits=remedy.edits,
        lost_s=case.prediction.step_time_s - after.step_time_s,
        lost_bytes=max(case.prediction.memory_bytes_per_stage) - max(after.memory_bytes_per_stage),
    )
