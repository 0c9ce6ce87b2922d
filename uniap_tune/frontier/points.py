"""The frontier of time against memory: plans of which none has both a lower TPI and a lower peak.

A point is found lexicographically: the least TPI under a limit, then the least peak at that TPI. Nothing dominates it:
within its peak no plan is faster, by the first step, and at its TPI none is leaner, by the second. The next limit below
the peak gives the next point. TPI and bytes closer than a relative ``TIE`` are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

from uniap_tune.frontier.epsilon import EpsilonSearch, Found
from uniap_tune.search import TIE

# Where points are spread, a gap is halved until it is this part of an even share; then its end is asked for.
_SMALLEST_GAP = 0.25


def below(peak_bytes: float) -> float:
    """The largest memory limit at which a peak counts as too high; below 0 nothing fits."""
    return peak_bytes * (1 - TIE) if peak_bytes > 0 else -1.0


def fastest_point(search: EpsilonSearch, limit_bytes: float) -> Found | None:
    """The point with the least TPI under a limit; ``None`` if nothing fits."""
    found = search.fastest(limit_bytes)
    if found is None:
        return None
    budget = found.objective_s * (1 + TIE)
    leanest = _leanest(lambda limit: search.fastest(limit, budget), found)
    return replace(leanest, bound_s=found.bound_s)


def leanest_point(search: EpsilonSearch, limit_bytes: float) -> Found | None:
    """The point with the least peak; ``None`` if nothing fits.

    Problem by problem, those that may be leanest first, until none can be leaner than the leanest plan found.
    """
    limit, leanest = limit_bytes, None
    for least, branch, number in search.by_least_bytes():
        if least > limit:
            break
        found = search.plan_of(branch, number, limit)
        if found is not None:
            ask = partial(search.plan_of, branch, number)
            leanest = _leanest(ask, found, guess_bytes=least * (1 + TIE))
            limit = below(leanest.peak_bytes)
    return None if leanest is None else fastest_point(search, leanest.peak_bytes)


def _leanest(ask: Callable[[float], Found | None], found: Found, *, guess_bytes: float = math.inf) -> Found:
    """The plan with the least peak, of those that are answered under some memory limit; one of them is given.

    Limits just below the best peak, which prove it or lower it, alternate with limits half-way to what is known to be
    too little. The first limit may be a guess.
    """
    too_little = 0.0
    trial = min(guess_bytes, below(found.peak_bytes))
    while True:
        is_proof = trial >= below(found.peak_bytes)
        leaner = ask(trial)
        if leaner is not None:
            found = leaner
        elif is_proof:
            return found
        else:
            too_little = trial
        halfway = (too_little + found.peak_bytes) / 2
        trial = halfway if is_proof and halfway < below(found.peak_bytes) else below(found.peak_bytes)


class Frontier:
    """The points found so far under a memory limit; ``complete``: they are all there are.

    A search cut short by a ``DeadlineError`` or by Ctrl-C leaves what it found.
    """

    def __init__(self, search: EpsilonSearch, limit_bytes: float) -> None:
        self.search = search
        self.limit_bytes = limit_bytes
        self.complete = False
        self._points: dict[float, Found] = {}  # by peak
        self._asked: dict[float, float] = {}  # the largest limit that is known to give a point, by its peak

    @property
    def points(self) -> list[Found]:
        """Fastest first.

        Where plans are judged by more than their TPI, a point found at a lower limit may beat one found before, which
        then is none.
        """
        kept: list[Found] = []
        for peak in sorted(self._points):
            point = self._points[peak]
            if not kept or point.objective_s < kept[-1].objective_s * (1 - TIE):
                kept.append(point)
        return kept[::-1]

    def trace(self) -> Iterator[Found]:
        """Every point, fastest first, as they are found."""
        limit = self.limit_bytes
        while (point := self._ask(limit)) is not None:
            yield point
            limit = below(point.peak_bytes)
        self.complete = True

    def spread(self, count: int) -> Iterator[Found]:
        """Up to ``count`` points (at least two where there are two) spread over the memory, as they are found."""
        first = self._ask(self.limit_bytes)
        if first is None:
            self.complete = True
            return
        yield first
        last = leanest_point(self.search, first.peak_bytes)
        if last is None or last.peak_bytes >= below(first.peak_bytes):
            self.complete = True
            return
        self._keep(last, last.peak_bytes)
        yield last
        share = (first.peak_bytes - last.peak_bytes) / max(1, count - 1)
        limits = (first.peak_bytes - number * share for number in range(1, count - 1))
        yield from self._ask_unknown(limits)
        while len(self._points) < count and (limit := self._in_largest_gap(share)) is not None:
            yield from self._ask_unknown([limit])
        self.complete = self._in_largest_gap(share) is None

    def _ask(self, limit: float) -> Found | None:
        point = fastest_point(self.search, limit)
        if point is not None:
            self._keep(point, limit)
        return point

    def _keep(self, point: Found, limit: float) -> None:
        peak = next((p for p in self._points if abs(p - point.peak_bytes) <= TIE * p), point.peak_bytes)
        self._points.setdefault(peak, point)
        self._asked[peak] = max(limit, self._asked.get(peak, 0.0))

    def _ask_unknown(self, limits: Iterator[float] | list[float]) -> Iterator[Found]:
        for limit in limits:
            if any(peak <= limit <= asked for peak, asked in self._asked.items()):
                continue
            size = len(self._points)
            point = self._ask(limit)
            if point is not None and len(self._points) > size:
                yield point

    def _in_largest_gap(self, share: float) -> float | None:
        """A limit in the largest range of which nothing is known; ``None`` if there is none."""
        peaks = sorted(self._points)
        gaps = [
            (below(upper) - self._asked[lower], self._asked[lower], below(upper))
            for lower, upper in pairwise(peaks)
            if self._asked[lower] < below(upper)
        ]
        if not gaps:
            return None
        size, low, high = max(gaps)
        return high if size < _SMALLEST_GAP * share else (low + high) / 2
