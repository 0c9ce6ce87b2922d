"""Loads configurations with DeepSpeed's own class, in a process of its own: ``deepspeed_check.py < cases.json``.

A case has ``config`` and ``batch_world``: over how many ranks DeepSpeed expects the batch to be spread, which is all of
them under automatic tensor parallelism, else the data-parallel ones. The answer, JSON in the same order, has ``error``
or what DeepSpeed understood.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.runtime.config as ds_config


class Ranks:
    """What the configuration asks of a model-parallel unit."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_data_parallel_world_size(self) -> int:
        """Ranks the batch is spread over."""
        return self.count


def check(case: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed understands."""
    with mock.patch.object(ds_config.dist, "get_rank", return_value=0):  # else it takes the world for one rank
        config = ds_config.DeepSpeedConfig(case["config"], mpu=Ranks(case["batch_world"]))
    zero = config.zero_config
    return {
        "train_batch_size": config.train_batch_size,
        "micro_batch": config.train_micro_batch_size_per_gpu,
        "accumulation": config.gradient_accumulation_steps,
        "stage": int(zero.stage),
        "reduce_bucket_size": zero.reduce_bucket_size,
        "prefetch": zero.prefetch_bucket_size,
        "persistence": zero.param_persistence_threshold,
        "overlap_comm": zero.overlap_comm,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
        "grad_accum_dtype": config.grad_accum_dtype,
        "autotp_size": config.tensor_parallel_config.autotp_size,
        "interval": config.pipeline["activation_checkpoint_interval"],
        "use_reentrant": config.pipeline.get("use_reentrant"),
    }


def main() -> None:
    """Check all cases; what DeepSpeed prints is thrown away."""
    answers = []
    for case in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answers.append(check(case))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print("\n" + json.dumps(answers))  # the last line, whatever DeepSpeed's loggers wrote before


main()
