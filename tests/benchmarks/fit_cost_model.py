"""Fits the efficiency constants of one GPU generation to measured step times, and cross-validates the fit.

    python tests/benchmarks/fit_cost_model.py ampere measured/*.jsonl
    python tests/benchmarks/fit_cost_model.py hopper measured/*.jsonl --leave-out family
    python tests/benchmarks/fit_cost_model.py generic measured/*.jsonl --leave-out generation --at-most 100

It prints the constants for ``uniap_tune/data/efficiency/<generation>.toml`` and the errors of the fit, in the sample
and with each model family (or size) left out in turn. The objective is the mean absolute log error plus twice its
square, plus a small penalty for leaving the shipped value, so that a constant the data says nothing about stays where
it is; coordinate descent in the logarithm of each constant finds the minimum. Records with assumptions that change
the answer count half; repeats of a configuration count once. The constants of ``generic`` are fitted to the records of
all generations, each of which weighs the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from uniap_tune.accuracy import Case, collapse
from uniap_tune.adapters.records import evaluate_file
from uniap_tune.cost.efficiency import GENERIC, Efficiency, load_efficiency
from uniap_tune.predict import Run, predict

# Constants that step times determine, with the bounds physics sets: no unit reaches more than its peak.
BOUNDS = {
    "gemm": (0.40, 0.90),
    "gemm_wave_exponent": (0.02, 1.0),
    "gemm_k_ramp": (20.0, 400.0),
    "memory": (0.60, 0.93),
    "flash": (0.35, 0.90),
    "flash_backward": (0.30, 0.80),
    "link": (0.50, 0.93),
    "tp_exposed": (0.15, 1.0),
}
POWER = {"efficient_flops_per_watt": (0.6e12, 1.6e12), "power_exponent": (0.33, 1.0)}  # one law for all generations
QUANTIZED = (0.30, 1.10)  # at the clocks of 16-bit multiplications, which take more power
PENALTY = 0.006


@dataclass(frozen=True)
class Sample:
    """A run and its measured seconds."""

    run: Run
    seconds: float
    share: float = 1.0

    @property
    def weight(self) -> float:
        return self.share if self.run.exact else 0.5 * self.share


def read_samples(paths: Sequence[Path], generation: str, at_most: int) -> list[Sample]:
    """Dense runs with a measured step time on one generation, or on all, thinned evenly to ``at_most`` on each; repeats
    collapsed to their median."""
    cases = []
    for path in paths:
        for one in evaluate_file(path):
            if one.run is None or one.measured is None or one.prediction is None:
                continue
            run = one.run
            wanted = generation in (run.cluster.device.generation, GENERIC)
            if wanted and run.model.moe is None and one.measured.step_time_s:
                cases.append(Case(file=path.name, run=run, measured=one.measured, prediction=one.prediction))
    found = [Sample(case.run, case.measured.step_time_s) for case in collapse(cases) if case.measured.step_time_s]
    thinned = []
    for name in sorted({generation_of(sample) for sample in found}):
        own = [sample for sample in found if generation_of(sample) == name]
        own = own[:: -(-len(own) // at_most)]
        thinned += [replace(sample, share=1 / len(own)) for sample in own]
    return thinned


def generation_of(sample: Sample) -> str:
    return sample.run.cluster.device.generation


def errors(samples: Sequence[Sample], efficiency: Efficiency) -> list[float]:
    """Logarithms of predicted over measured seconds."""
    return [math.log(predict(s.run, efficiency=efficiency).step_time_s / s.seconds) for s in samples]


def objective(samples: Sequence[Sample], efficiency: Efficiency, start: Efficiency) -> float:
    weights = [sample.weight for sample in samples]
    loss = sum(w * (abs(e) + 2 * e * e) for w, e in zip(weights, errors(samples, efficiency), strict=True))
    moved = sum(abs(math.log(get(efficiency, name) / get(start, name))) for name in names(start))
    return loss / sum(weights) + PENALTY * moved


def names(efficiency: Efficiency) -> list[str]:
    power = POWER if efficiency.generation == GENERIC else {}
    return [*BOUNDS, *power, *(f"quantized.{dtype}" for dtype in efficiency.quantized)]


def get(efficiency: Efficiency, name: str) -> float:
    if name.startswith("quantized."):
        return next(v for dtype, v in efficiency.quantized.items() if f"quantized.{dtype}" == name)
    return float(getattr(efficiency, name))


def put(efficiency: Efficiency, name: str, value: float) -> Efficiency:
    if name.startswith("quantized."):
        changed = {d: value if f"quantized.{d}" == name else v for d, v in efficiency.quantized.items()}
        return replace(efficiency, quantized=changed)
    return replace(efficiency, **{name: value})


def fit(samples: Sequence[Sample], start: Efficiency, rounds: int) -> Efficiency:
    """Coordinate descent; a constant's step halves when neither direction helps."""
    best, efficiency = objective(samples, start, start), start
    steps = dict.fromkeys(names(start), 0.12)
    for _ in range(rounds):
        for name, step in steps.items():
            low, high = {**BOUNDS, **POWER}.get(name, QUANTIZED)
            for factor in (math.exp(step), math.exp(-step)):
                value = min(high, max(low, get(efficiency, name) * factor))
                tried = put(efficiency, name, value)
                score = objective(samples, tried, start)
                if score < best - 1e-7:
                    best, efficiency = score, tried
                    break
            else:
                steps[name] = step / 2
    return efficiency


def summary(found: Sequence[float]) -> str:
    ordered = sorted(abs(math.exp(error) - 1) for error in found)
    p90 = ordered[int(0.9 * (len(ordered) - 1))]
    return (
        f"n {len(found)}  median {statistics.median(ordered):.1%}  mean {statistics.fmean(ordered):.1%}  p90 {p90:.1%}"
    )


KEYS: dict[str, Callable[[Sample], object]] = {
    "family": lambda sample: sample.run.model.family,
    "model": lambda sample: sample.run.model.name,
    "hidden": lambda sample: sample.run.model.hidden_size,
    "generation": generation_of,
}


def cross_validate(samples: Sequence[Sample], start: Efficiency, key: Callable[[Sample], object], rounds: int) -> None:
    every: list[float] = []
    complete: list[float] = []
    for label in sorted({key(sample) for sample in samples}, key=str):
        seen = [sample for sample in samples if key(sample) != label]
        unseen = [sample for sample in samples if key(sample) == label]
        if not seen:
            print(f"  {label}: the only one, cannot be left out")
            continue
        found = errors(unseen, fit(seen, start, rounds))
        print(f"  without {label}: {summary(found)}")
        every += found
        complete += [error for error, sample in zip(found, unseen, strict=True) if sample.run.exact]
    if every:
        print(f"left out, all:      {summary(every)}")
    if complete:
        print(f"left out, complete: {summary(complete)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generation")
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--at-most", type=int, default=10**6, help="samples of a generation, for a quick fit")
    parser.add_argument("--leave-out", choices=list(KEYS), default="model")
    parser.add_argument("--from-generic", action="store_true", help="start from the constants of no generation")
    args = parser.parse_args()
    samples = read_samples(args.records, args.generation, args.at_most)
    start = load_efficiency(GENERIC if args.from_generic else args.generation)
    print(f"shipped:   {summary(errors(samples, start))}")
    fitted = fit(samples, start, args.rounds)
    print(f"in sample: {summary(errors(samples, fitted))}")
    for name in names(fitted):
        print(f"{name} = {get(fitted, name):.3g}    # was {get(start, name):.3g}")
    cross_validate(samples, start, KEYS[args.leave_out], args.rounds)


if __name__ == "__main__":
    main()
