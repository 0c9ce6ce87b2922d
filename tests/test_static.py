"""The code is formatted, linted and strictly typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path) -> None:
    """Run a module of this Python and show what it says if it fails."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    pytest.importorskip("ruff")
    run("ruff", *command, ".", cwd=ROOT)


def test_mypy(tmp_path: Path) -> None:
    """On the tree as it is installed, because mypy does not follow the mapping of the top-level folders."""
    pytest.importorskip("mypy")
    shutil.copytree(ROOT / "uniap_tune", tmp_path / "uniap_tune")
    for folder in ("adapters", "templates"):
        shutil.copytree(ROOT / folder, tmp_path / "uniap_tune" / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    run("mypy", "--strict", "-p", "uniap_tune", cwd=tmp_path)
