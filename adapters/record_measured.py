"""What a record says was measured."""

from __future__ import annotations

from uniap_tune.accuracy import Measured
from uniap_tune.predict import Run
from uniap_tune.units import GIB, MIB

from .record_fields import Fields, number


def read_measured(record: Fields, run: Run) -> Measured:
    """Step time (or what follows from tokens/s a GPU) and allocated memory of a record."""
    seconds = number(record, "step_time_s", "measured_step_s", "iteration_time_s")
    tokens = number(record, "tokens_per_s_per_gpu")
    if seconds is None and tokens is not None and record.get("gbs") is not None:
        seconds = run.job.global_batch * run.job.seq_length / tokens / run.cluster.num_devices
    peak = number(record, "mem_max_allocated_bytes")
    gibibytes = number(record, "measured_mem_gib")
    if peak is None and gibibytes is not None:
        peak = gibibytes * GIB
    return Measured(
        step_time_s=seconds,
        steady_bytes=number(record, "mem_allocated_bytes_steady"),
        peak_bytes=peak,
        peak_bytes_per_stage=_per_stage(record, run.pp),
    )


def _per_stage(record: Fields, stages: int) -> tuple[float, ...] | None:
    for key in ("measured_max_alloc_mib_per_stage", "measured_mem_mib_per_stage"):
        values = record.get(key)
        if isinstance(values, list) and len(values) == stages:
            numbers = [number({key: value}, key) for value in values]
            if all(value is not None for value in numbers):
                return tuple(value * MIB for value in numbers if value is not None)
    return None
