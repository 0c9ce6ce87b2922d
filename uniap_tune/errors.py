"""Errors a person can act on, and the process exit codes.

Every error that reaches a user says *what* is wrong, *why*, and how to *fix* it. The command line prints the
three parts on stderr and exits with ``error.exit_code``; it never shows a traceback for a :class:`TuneError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    INTERNAL = 1
    BAD_INPUT = 2
    INFEASIBLE = 3
    OUT_OF_MEMORY = 4
    STOPPED = 5
    DRIFT = 6


class TuneError(Exception):
    """An error with a cause and a remedy.

    Args:
        what: one sentence: what went wrong, naming the file and key where there is one.
        why: the reason, with the numbers.
        fix: what the user can do about it.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"why: {self.why}")
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "; ".join(parts)


class InputError(TuneError):
    """Bad usage or bad input: exit code 2."""

    exit_code = ExitCode.BAD_INPUT


class UnsupportedError(InputError):
    """The input is understood, but the chosen target cannot do it: exit code 2."""


class InfeasibleError(TuneError):
    """No plan fits: exit code 3. ``relaxations`` are changes that would make one fit, smallest first."""

    exit_code = ExitCode.INFEASIBLE

    def __init__(self, what: str, *, why: str = "", fix: str = "", relaxations: Sequence[str] = ()) -> None:
        super().__init__(what, why=why, fix=fix)
        self.relaxations = tuple(relaxations)


class StoppedError(TuneError):
    """Stopped by a limit or by the user before any plan was found: exit code 5."""

    exit_code = ExitCode.STOPPED


def message(error: TuneError) -> str:
    """The error for stderr: what, why, the fix, and the relaxations, one a line."""
    lines = [f"error: {error.what}"]
    if error.why:
        lines.append(f"  why: {error.why}")
    if error.fix:
        lines.append(f"  fix: {error.fix}")
    lines += [f"    - {relaxation}" for relaxation in getattr(error, "relaxations", ())]
    return "\n".join(lines)
