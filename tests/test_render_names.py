"""The names of launch files are known in advance, so that those of an earlier plan can be told from a user's own."""

from __future__ import annotations

import pytest

from tests.launches import Launch, deepspeed_launches, megatron_launches
from uniap_tune.render import EXECUTABLE, LAUNCH_FILES, render


@pytest.mark.parametrize("launch", [*megatron_launches(), *deepspeed_launches()], ids=lambda launch: launch.name)
def test_every_file_has_a_known_name(launch: Launch) -> None:
    files = set(render(launch.plan, launch.model, launch.cluster, launch.job))
    assert "launch.sh" in files
    assert files <= LAUNCH_FILES
    assert EXECUTABLE <= LAUNCH_FILES
