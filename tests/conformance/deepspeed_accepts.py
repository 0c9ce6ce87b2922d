"""Says of each configuration on stdin, a JSON object a line, whether DeepSpeed's own class accepts it.

A line is ``{"config": …, "ranks": N}``, the answer what DeepSpeed raised, or an empty line.
"""

from __future__ import annotations

import json
import os
import sys
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what DeepSpeed prints is thrown away
import deepspeed.runtime.config as ds_config  # noqa: E402 - after its output is out of the way


class Ranks:
    """What the configuration asks of a model-parallel unit."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_data_parallel_world_size(self) -> int:
        """Ranks the batch is spread over."""
        return self.count


answers.write("ready\n")
for line in sys.stdin:
    case = json.loads(line)
    try:
        with mock.patch.object(ds_config.dist, "get_rank", return_value=0):
            ds_config.DeepSpeedConfig(case["config"], mpu=Ranks(case["ranks"]))
        answers.write("\n")
    except Exception as error:
        answers.write(" ".join(f"{type(error).__name__}: {error}".split()) + "\n")
