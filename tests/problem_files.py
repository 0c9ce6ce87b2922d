"""Problems as the text of ``solve``'s format."""

from __future__ import annotations

import json
from typing import Any

from uniap_tune.problem import Problem


def document(problem: Problem) -> dict[str, Any]:
    """The JSON document of a problem without a leading rule, which the format does not have."""
    layers = [
        {
            "name": f"layers.{u}",
            "layout": table.layout.tolist(),
            "time_s": table.time_s.tolist(),
            "step_time_s": table.step_time_s.tolist(),
            "static_bytes": table.static_bytes.tolist(),
            "microbatch_bytes": table.microbatch_bytes.tolist(),
            "transient_bytes": table.transient_bytes.tolist(),
            "step_bytes": table.step_bytes.tolist(),
        }
        for u, table in enumerate(problem.layers)
    ]
    edges = [
        {"from": e.source, "to": e.target, "reshard_s": e.reshard_s.tolist(), "send_s": e.send_s.tolist()}
        for e in problem.edges
    ]
    return {
        "schema_version": 1,
        "num_stages": problem.num_stages,
        "num_microbatches": problem.num_microbatches,
        "schedule": str(problem.schedule),
        "memory_limit_bytes": problem.memory_limit_bytes,
        "layers": layers,
        "edges": edges,
    }


def text(problem: Problem) -> str:
    """The file."""
    return json.dumps(document(problem))


def small() -> dict[str, Any]:
    """Four layers, two strategies, two stages: every key of the format is there."""
    layer = {
        "name": "a",
        "layout": [0, 1],
        "time_s": [1.0, 2.0],
        "step_time_s": [0.1, 0.2],
        "static_bytes": [10.0, 5.0],
        "microbatch_bytes": [1.0, 0.5],
        "transient_bytes": [2.0, 1.0],
        "step_bytes": [3.0, 1.0],
    }
    matrix = [[0.0, 1.0], [1.0, 0.5]]
    return {
        "schema_version": 1,
        "num_stages": 2,
        "num_microbatches": 8,
        "schedule": "1f1b",
        "memory_limit_bytes": 40.0,
        "layers": [json.loads(json.dumps(layer)) for _ in range(4)],
        "edges": [{"from": u, "to": u + 1, "reshard_s": matrix, "send_s": matrix} for u in range(3)],
    }
