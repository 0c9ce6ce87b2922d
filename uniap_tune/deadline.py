"""A point in time at which long computations stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class DeadlineError(Exception):
    """The time limit ran out inside a solver."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time to stop at (``time.monotonic``)."""

    at: float = math.inf

    def check(self) -> None:
        """Raise :class:`DeadlineError` when the time is over."""
        if self.is_over():
            raise DeadlineError

    def left(self) -> float:
        """Seconds until then, at least a moment; ``inf`` without a deadline."""
        return max(1e-3, self.at - time.monotonic())

    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.at

    @staticmethod
    def after(seconds: float | None) -> Deadline:
        """The deadline that many seconds from now; never, for ``None``."""
        return Deadline() if seconds is None else Deadline(time.monotonic() + seconds)
