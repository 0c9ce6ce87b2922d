"""A ``plan.json`` of ours: the plan, and the model, the cluster and the job it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.graph import build_graph
from uniap_tune.plan import Plan, plan_from_dict
from uniap_tune.spec import (
    Cluster,
    DType,
    Job,
    Mla,
    Model,
    Moe,
    Norm,
    OptimizerName,
    Position,
    Precision,
    QkNorm,
    Recompute,
)

from .cluster import cluster_from_dict
from .deepspeed import read_config
from .documents import printable

_AGAIN = "write the plan again with `uniap-tune plan … -o DIR`"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What a ``plan.json`` holds."""

    plan: Plan
    model: Model
    cluster: Cluster
    job: Job


def is_plan(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a plan."""
    return {"schema_version", "stages", "inputs", "target"} <= values.keys()


def read_plan(path: Path) -> PlanFile:
    """The plan of a file.

    Raises:
        InputError: not a plan, of another schema version, or changed by hand so that it is none any more.
    """
    return plan_file(read_config(path), printable(str(path)))


def plan_file(values: Mapping[str, Any], where: str) -> PlanFile:
    """As :func:`read_plan`, of what is in the file."""
    plan = plan_from_dict(values, where)
    inputs = plan.inputs
    try:
        model, job, cluster = (dict(inputs[key]) for key in ("model", "job", "cluster"))
        found = PlanFile(
            plan=plan,
            model=_model(model),
            cluster=cluster_from_dict(cluster, f"{where}: inputs.cluster"),
            job=_job(job),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: inputs is not what a plan was made from: {printable(json.dumps(str(error)))}",
            fix=_AGAIN,
        ) from None
    _require_whole(found, where)
    return found


def _require_whole(file: PlanFile, where: str) -> None:
    """The stages hold the layers of the model, each with its strategy."""
    plan = file.plan
    layers = sorted(name for stage in plan.stages for name in stage.layers)  # interleaved stages hold no interval
    expected = sorted(layer.name for layer in build_graph(file.model).layers)
    paired = all(len(stage.layers) == len(stage.strategies) for stage in plan.stages)
    if layers != expected or not paired or len(plan.stages) != plan.pp:
        raise InputError(
            f"{where}: its stages are not those of {file.model.name}",
            why=f"they must hold its {len(expected)} layers, each with a strategy",
            fix=_AGAIN,
        )


def _model(data: Mapping[str, Any]) -> Model:
    values = {item.name: data[item.name] for item in fields(Model) if item.name in data}
    return Model(
        **values
        | {
            "norm": Norm(data["norm"]),
            "qk_norm": QkNorm(data["qk_norm"]),
            "position": Position(data["position"]),
            "moe": Moe(**data["moe"]) if data["moe"] else None,
            "mla": Mla(**data["mla"]) if data["mla"] else None,
        }
    )


def _job(data: Mapping[str, Any]) -> Job:
    values = {item.name: data[item.name] for item in fields(Job) if item.name in data}
    precision = dict(data["precision"])
    return Job(
        **values
        | {
            "precision": Precision(**precision | {"compute": DType(precision["compute"])}),
            "optimizer": OptimizerName(data["optimizer"]),
            "allowed_recompute": frozenset(Recompute(mode) for mode in data["allowed_recompute"]),
        }
    )
