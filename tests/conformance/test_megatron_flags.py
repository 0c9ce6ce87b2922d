"""The shipped tables of arguments against Megatron's own parser: of the wheel, or of UNIAP_TUNE_MEGATRON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.test_megatron_arguments import megatron as megatron  # the fixture
from uniap_tune.megatron.versions import VERSIONS, megatron_version

SCRIPT = Path(__file__).with_name("megatron_flags.py")


@pytest.mark.slow
def test_the_table_is_what_the_parser_knows(megatron: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(megatron)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    tables = {table.release: table for table in map(megatron_version, VERSIONS)}
    if found["version"] not in tables:
        pytest.skip(f"there is no table of {found['version']}")
    table = tables[found["version"]]
    assert table.arguments == {*found["switches"], *found["values"], *found["lists"]}
    assert table.null_tokenizer_adds == found["null_tokenizer_adds"]
