"""Ten thousand damaged recipes: no traceback, none takes long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe_fuzz import survive_all


@pytest.mark.benchmark
def bench_ten_thousand_damaged_recipes(tmp_path: Path) -> None:
    assert survive_all(range(10_000), tmp_path) < 2.0
