"""How good predictions are against measurements: errors, rankings, and verdicts, in the form ``accuracy`` prints.

Errors are absolute, as fractions of the measured value. Repeats of one configuration count once, at their median.
Rankings compare the configurations of one model on one number of GPUs at one batch size; pairs that were measured
within 3% of each other say nothing and are left out.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from uniap_tune.predict import Prediction, Run
from uniap_tune.units import GIB, MIB

_SAME = 0.03  # measurements closer than this are repeats of each other
_SMALL = GIB  # below this, memory is judged in absolute terms
_FLOOR = 64 * MIB  # cuBLAS workspaces are not recorded and differ by about this much
_LARGE_GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a record says was measured; ``None`` where it says nothing. Bytes of allocated memory."""

    step_time_s: float | None = None
    steady_bytes: float | None = None
    peak_bytes: float | None = None
    peak_bytes_per_stage: tuple[float, ...] | None = None

    @property
    def anything(self) -> bool:
        """Whether the record measured something, and so ran."""
        return self != Measured()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One record: its file, its run, what was measured and what was predicted."""

    file: str
    run: Run
    measured: Measured
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute relative errors of a set of configurations."""

    count: int
    median: float
    mean: float
    p90: float
    p95: float
    worst: float
    worst_id: str
    bias: float
    in_band: float | None = None

    def as_dict(self) -> dict[str, float | int | str | None]:
        """For JSON."""
        return {
            "count": self.count,
            "median_error": self.median,
            "mean_error": self.mean,
            "p90_error": self.p90,
            "p95_error": self.p95,
            "worst_error": self.worst,
            "worst_id": self.worst_id,
            "median_bias": self.bias,
            "in_band": self.in_band,
        }


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well configurations of one job are ordered, over all jobs with at least two."""

    groups: int
    kendall_tau: float | None
    mean_regret: float
    worst_regret: float
    large_groups: int
    large_within_3_percent: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return {
            "groups": self.groups,
            "kendall_tau": self.kendall_tau,
            "mean_regret": self.mean_regret,
            "worst_regret": self.worst_regret,
            "groups_of_8": self.large_groups,
            "groups_of_8_within_3_percent": self.large_within_3_percent,
        }


def collapse(cases: Iterable[Case]) -> list[Case]:
    """One case for each configuration of a file; its measurements are the medians of the repeats."""
    groups: dict[object, list[Case]] = defaultdict(list)
    for case in cases:
        known = tuple(value is not None for value in (case.measured.step_time_s, case.measured.peak_bytes))
        groups[(case.file, repr(replace(case.run, id="", assumptions=())), known)].append(case)
    return [_median_case(group) for group in groups.values()]


def _median_case(group: Sequence[Case]) -> Case:
    first = group[0]
    if len(group) == 1:
        return first
    measured = [case.measured for case in group]
    return replace(
        first,
        measured=replace(
            first.measured,
            step_time_s=_median([m.step_time_s for m in measured]),
            steady_bytes=_median([m.steady_bytes for m in measured]),
            peak_bytes=_median([m.peak_bytes for m in measured]),
        ),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def time_errors(cases: Iterable[Case]) -> Errors | None:
    """Errors of step times; ``None`` when nothing was measured."""
    rows = []
    inside = []
    for case in cases:
        measured = case.measured.step_time_s
        if measured is not None:
            prediction = case.prediction
            rows.append((prediction.step_time_s / measured - 1, case.run.id))
            inside.append(prediction.step_time_low_s <= measured <= prediction.step_time_high_s)
    return _errors(rows, inside)


def steady_errors(cases: Iterable[Case]) -> Errors | None:
    """Errors of the memory held all the time."""
    rows = [
        (memory_error(case.prediction.steady_memory_bytes, case.measured.steady_bytes), case.run.id)
        for case in cases
        if case.measured.steady_bytes is not None
    ]
    return _errors(rows)


def peak_errors(cases: Iterable[Case]) -> Errors | None:
    """Errors of peak memory, of every stage where each stage was measured."""
    rows = []
    inside = []
    for case in cases:
        prediction = case.prediction
        stages = case.measured.peak_bytes_per_stage
        if stages is not None and len(stages) == len(prediction.memory_bytes_per_stage):
            for predicted, measured in zip(prediction.memory_bytes_per_stage, stages, strict=True):
                rows.append((memory_error(predicted, measured), case.run.id))
        elif case.measured.peak_bytes is not None:
            measured = case.measured.peak_bytes
            rows.append((memory_error(prediction.peak_memory_bytes, measured), case.run.id))
            inside.append(prediction.peak_memory_low_bytes <= measured <= prediction.peak_memory_high_bytes)
    return _errors(rows, inside)


def memory_error(predicted: float, measured: float) -> float:
    """Signed error as a fraction; under 1 GiB only what exceeds the floor of 64 MiB counts."""
    difference = predicted - measured
    if measured < _SMALL:
        sign = 1 if difference > 0 else -1
        difference = sign * max(0.0, abs(difference) - _FLOOR)
    return difference / measured


def _errors(rows: Sequence[tuple[float, str]], inside: Sequence[bool] = ()) -> Errors | None:
    if not rows:
        return None
    ordered = sorted(abs(error) for error, _ in rows)
    worst = max(rows, key=lambda row: abs(row[0]))
    return Errors(
        len(rows),
        statistics.median(ordered),
        statistics.fmean(ordered),
        _quantile(ordered, 0.90),
        _quantile(ordered, 0.95),
        abs(worst[0]),
        worst[1],
        statistics.median(error for error, _ in rows),
        statistics.fmean(inside) if inside else None,
    )


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Linear interpolation between order statistics."""
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ranking(cases: Iterable[Case]) -> Ranking | None:
    """Order of the configurations of each job (model, GPUs, sequence length, batch, precision)."""
    groups: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        if case.measured.step_time_s is not None:
            run = case.run
            key = (case.file, repr((run.model, run.cluster, run.job)))
            groups[key].append((case.measured.step_time_s, case.prediction.step_time_s))
    rows = [group for group in groups.values() if len(group) > 1]
    if not rows:
        return None
    agree = sum(_agreement(group)[0] for group in rows)
    pairs = sum(_agreement(group)[1] for group in rows)
    regrets = [_regret(group) for group in rows]
    large = [_regret(group) for group in rows if len(group) >= _LARGE_GROUP]
    return Ranking(
        len(rows),
        agree / pairs if pairs else None,
        statistics.fmean(regrets),
        max(regrets),
        len(large),
        statistics.fmean(regret <= _SAME for regret in large) if large else None,
    )


def _agreement(group: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Concordant minus discordant pairs, and pairs, of those measured more than 3% apart."""
    score = pairs = 0
    for index, (measured, predicted) in enumerate(group):
        for other_measured, other_predicted in group[index + 1 :]:
            if max(measured, other_measured) / min(measured, other_measured) - 1 <= _SAME:
                continue
            pairs += 1
            order = (measured - other_measured) * (predicted - other_predicted)
            score += (order > 0) - (order < 0)
    return score, pairs


def _regret(group: Sequence[tuple[float, float]]) -> float:
    """How much slower the configuration predicted to be best is than the best measured."""
    chosen = min(group, key=lambda pair: pair[1])[0]
    return chosen / min(measured for measured, _ in group) - 1


def summarize(cases: Sequence[Case]) -> Mapping[str, object]:
    """All scores of a set of cases, for JSON; parts that were not measured are left out."""
    once = collapse(cases)
    parts: dict[str, object] = {"records": len(cases), "configurations": len(once)}
    scores = {
        "step_time": time_errors(once),
        "steady_memory": steady_errors(once),
        "peak_memory": peak_errors(once),
        "ranking": ranking(once),
    }
    parts.update({name: score.as_dict() for name, score in scores.items() if score is not None})
    ran = [case for case in once if case.measured.anything]
    if ran:  # whatever was measured did fit
        parts["called_unfit"] = sum(not case.prediction.fits for case in ran) / len(ran)
    return parts
