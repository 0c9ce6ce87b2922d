"""Damaged recipes end in one clear error, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe_fuzz import CLUSTER, Damage, survive, survive_all, whole_files
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.cli import main

# CPU seconds. The benchmark holds 2; here a busy machine must not fail what is no hang.
LIMIT_S = 10.0


@pytest.mark.parametrize("case", range(len(whole_files())))
def test_files_damaged_as_a_whole(case: int, tmp_path: Path) -> None:
    suffix, content = whole_files()[case]
    message, seconds = survive(Damage(suffix, content), tmp_path, read_cluster(CLUSTER))
    assert message
    assert seconds < LIMIT_S


def test_damaged_recipes(tmp_path: Path) -> None:
    assert survive_all(range(500), tmp_path) < LIMIT_S


def test_the_command_exits_with_two_and_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.sh"
    path.write_text('ARGS=(\n  --num-layers 4\n  "--hidden-size 8\n)\n')
    assert main(["tune", str(path), "--cluster", "1x8:h100"]) == 2
    assert f'{path}:3: " is never closed' in capsys.readouterr().err
