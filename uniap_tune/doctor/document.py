"""A diagnosis as JSON (schema_version 1; docs/reference/doctor.md has every key)."""

from __future__ import annotations

from typing import Any

from uniap_tune.breakdown import Breakdown
from uniap_tune.doctor.diagnosis import Diagnosis, Improvement
from uniap_tune.doctor.finding import Finding
from uniap_tune.doctor.setup import shown_settings

SCHEMA_VERSION = 1


def document(diagnosis: Diagnosis) -> dict[str, Any]:
    """JSON-ready, without anything that differs between two runs."""
    setup = diagnosis.setup
    return {
        "schema_version": SCHEMA_VERSION,
        "status": status(diagnosis),
        "is_certain": diagnosis.is_certain,
        "recipe": setup.name,
        "format": setup.format,
        "engine": setup.engine,
        "model": setup.model.name,
        "cluster": setup.cluster.name,
        "settings": shown_settings(setup),
        "memory_limit_bytes": diagnosis.limit.memory_bytes,
        "broken_rules": [{"rule": rule, "sentence": sentence} for rule, sentence in diagnosis.broken],
        "today": _today(diagnosis, diagnosis.breakdown) if diagnosis.breakdown is not None else None,
        "findings": [_finding(item) for item in diagnosis.findings],
        "changes": [_change(item) for item in diagnosis.improvements],
        "nearest": _change(diagnosis.nearest) if diagnosis.nearest is not None else None,
        "notes": list(setup.notes),
    }


def status(diagnosis: Diagnosis) -> str:
    """``fits``, ``out_of_memory`` or ``refused``."""
    if diagnosis.fits is None:
        return "refused"
    return "fits" if diagnosis.fits else "out_of_memory"


def _today(diagnosis: Diagnosis, breakdown: Breakdown) -> dict[str, Any]:
    prediction = breakdown.prediction
    return {
        "step_time_s": prediction.step_time_s,
        "step_time_low_s": prediction.step_time_low_s,
        "step_time_high_s": prediction.step_time_high_s,
        "tokens_per_s": breakdown.tokens_per_s,
        "mfu": breakdown.mfu,
        "time": dict(breakdown.time),
        "bubble": breakdown.bubble,
        "overhead_bytes": prediction.overhead_bytes,
        "peak_memory_low_bytes": prediction.peak_memory_low_bytes,
        "peak_memory_high_bytes": prediction.peak_memory_high_bytes,
        "fullest_stage": diagnosis.fullest,
        "stages": [
            {"blocks": blocks, "time_s": seconds, "used_bytes": used, "room_bytes": room, "memory": dict(memory)}
            for blocks, seconds, used, room, memory in zip(
                breakdown.blocks,
                breakdown.stage_s,
                prediction.memory_bytes_per_stage,
                diagnosis.room_bytes,
                breakdown.memory,
                strict=True,
            )
        ],
    }


def _finding(item: Finding) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "sentence": item.sentence,
        "edits": list(item.edits),
        "lost_s": item.lost_s,
        "lost_bytes": item.lost_bytes,
    }


def _change(item: Improvement) -> dict[str, Any]:
    return {
        "setting": item.setting,
        "title": item.title,
        "edits": list(item.edits),
        "step_time_s": item.prediction.step_time_s,
        "gain": item.gain,
        "room_bytes": item.room_bytes,
        "peak_memory_bytes": item.prediction.peak_memory_bytes,
    }
