"""CPU time that the hook of ``uniap-tune deepspeed enable`` adds to the start of a plain Python.

Run with ``pytest -o python_files='bench_*.py' -o python_functions='bench_*' -s`` and this file.
"""

from __future__ import annotations

import os
import statistics
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from uniap_tune.deepspeed.activation import FILE, LINE

PAIRS = 80
MOST_SECONDS = 0.001


def cpu_seconds(python: str) -> float:
    """User and system time of ``python -c pass``, in clock ticks far finer than the limit (getrusage)."""
    child = os.posix_spawn(python, [python, "-c", "pass"], os.environ)
    _, _, usage = os.wait4(child, 0)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.benchmark
def bench_the_hook_adds_less_than_a_millisecond(tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    paths = {"base": str(tmp_path), "platbase": str(tmp_path)}
    line = Path(sysconfig.get_path("purelib", "venv", paths)) / FILE
    python = str(Path(sysconfig.get_path("scripts", "venv", paths)) / Path(sys.executable).name)
    differences = []
    for _ in range(PAIRS):
        line.unlink(missing_ok=True)
        without = cpu_seconds(python)
        line.write_text(LINE, encoding="utf-8")
        differences.append(cpu_seconds(python) - without)
    added = statistics.median(differences)
    print(f"the hook adds {added * 1e3:.2f} ms of CPU time (median of {PAIRS} pairs)")
    assert added <= MOST_SECONDS
