"""The answer: a frozen, versioned plan that can be written as JSON, read back, rendered and explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.spec import Recompute
from uniap_tune.strategy import Strategy, Target

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline stage.

    Attributes:
        layers: names, in order.
        strategies: one for each layer.
        chunks: with virtual stages, how many of the layers each model chunk holds; chunk k of stage i is virtual
            stage k * pp + i. Empty without.
        chunk_shares: the part of ``time_s`` in each chunk.
        time_s: seconds of one micro-batch, forward and backward (p_i of the formulation).
        forward_s: the forward part of ``time_s``.
        link_s: seconds of one micro-batch on the link to the next stage, there and back (o_i). After the last stage 0,
            or with virtual stages the link back to the first.
        step_s: seconds once a step (sum of g).
        time: seconds of one micro-batch by part (compute, recompute, tp_comm, …); they sum to ``time_s``.
        step: seconds once a step by part; they sum to ``step_s``.
        memory: bytes of the fullest device by part; they sum to the stage's peak.
    """

    layers: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    time_s: float
    forward_s: float
    link_s: float
    step_s: float
    time: Mapping[str, float]
    step: Mapping[str, float]
    memory: Mapping[str, float]
    chunks: tuple[int, ...] = ()
    chunk_shares: tuple[float, ...] = ()

    @property
    def peak_bytes(self) -> float:
        """Bytes of the fullest device at the peak."""
        return sum(self.memory.values())

    @property
    def num_blocks(self) -> int:
        """Transformer blocks on the stage."""
        return sum(name.startswith("layers.") for name in self.layers)

    def chunk_layers(self) -> list[tuple[str, ...]]:
        """The layers of each model chunk, in order; one chunk without virtual stages."""
        ends = list(accumulate(self.chunks or (len(self.layers),)))
        return [self.layers[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def block_strategies(self) -> list[Strategy]:
        """The strategies of its transformer blocks, in order."""
        return [s for name, s in zip(self.layers, self.strategies, strict=True) if name.startswith("layers.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A parallel plan for one job on one cluster.

    Attributes:
        status: ``optimal`` (proven within the gap asked for) or ``limit`` (stopped; the gap says how far).
        objective_s: seconds of a step by the closed form of the formulation (TPI).
        bound_s: proven lower bound on the objective of every plan in the search space.
        step_time_s: seconds of a step by event simulation of the schedule: what to expect.
        mfu: model FLOP utilization: model FLOPs / (step time x devices x peak FLOP/s of the compute dtype).
        virtual_stages: model chunks on each stage; more than one is interleaved 1F1B.
        micro_batch_size: samples of a micro-batch on one data-parallel replica (of the first layer).
        inputs: everything the plan was made from, JSON-ready, and its hash.
        assumptions: what the model leaves out or supposes, one sentence each.
    """

    status: str
    target: Target
    objective_s: float
    bound_s: float
    gap: float
    step_time_s: float
    tokens_per_s: float
    mfu: float
    memory_limit_bytes: float
    pp: int
    num_microbatches: int
    micro_batch_size: int
    schedule: str
    stages: tuple[Stage, ...]
    virtual_stages: int = 1
    inputs: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def peak_memory_bytes(self) -> float:
        """Bytes of the fullest device of the fullest stage."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """One for each layer, stage by stage (the model's order without virtual stages)."""
        return tuple(s for stage in self.stages for s in stage.strategies)

    def virtual_stage_layers(self) -> list[tuple[str, ...]]:
        """The layers of each virtual stage, in the model's order."""
        by_stage = [stage.chunk_layers() for stage in self.stages]
        return [by_stage[i][chunk] for chunk in range(self.virtual_stages) for i in range(self.pp)]

    def virtual_stage_blocks(self) -> list[list[Strategy]]:
        """The strategies of each virtual stage's transformer blocks, in the model's order."""
        strategies = {name: s for stage in self.stages for name, s in zip(stage.layers, stage.strategies, strict=True)}
        return [
            [strategies[name] for name in names if name.startswith("layers.")] for names in self.virtual_stage_layers()
        ]

    def uniform(self) -> Strategy | None:
        """The one (tp, cp, dp, ep, zero) of all layers (recompute aside), ``None`` if they differ."""
        first = self.strategies[0]
        key = _grid(first)
        return first if all(_grid(s) == key for s in self.strategies) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without anything that differs between two runs."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "stages":
                data["peak_memory_bytes"] = self.peak_memory_bytes
                data["stages"] = [_stage_dict(stage) for stage in value]
            else:
                data[item.name] = list(value) if isinstance(value, tuple) else value
        return data

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=False) + "\n"


def plan_from_dict(data: Mapping[str, Any], where: str) -> Plan:
    """Read back what :meth:`Plan.to_dict` wrote.

    Raises:
        InputError: not a plan, or of another schema version; ``where`` names the file.
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version is {version!r}",
            why=f"this version reads plans of schema_version {SCHEMA_VERSION}",
            fix="write the plan again with `uniap-tune plan … -o DIR`",
        )
    try:
        values = {f.name: data[f.name] for f in fields(Plan) if f.name in data}
        values["target"] = Target(values["target"])
        values["stages"] = tuple(_stage(stage) for stage in values["stages"])
        values["assumptions"] = tuple(values.get("assumptions", ()))
        return Plan(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a plan: {error}", fix="give a plan.json written by uniap-tune") from error


def _grid(strategy: Strategy) -> tuple[int, ...]:
    return (strategy.tp, strategy.cp, strategy.dp, strategy.ep, strategy.etp, strategy.zero)


def _stage_dict(stage: Stage) -> dict[str, Any]:
    data = {f.name: getattr(stage, f.name) for f in fields(stage)}
    data["layers"] = list(stage.layers)
    data["chunks"], data["chunk_shares"] = list(stage.chunks), list(stage.chunk_shares)
    data["strategies"] = [asdict(s) for s in stage.strategies]
    for name in ("time", "step", "memory"):
        data[name] = dict(data[name])
    data["peak_bytes"] = stage.peak_bytes
    return data


def _stage(data: Mapping[str, Any]) -> Stage:
    values = {f.name: data[f.name] for f in fields(Stage) if f.name in data}
    values["layers"] = tuple(values["layers"])
    for name in ("chunks", "chunk_shares"):
        values[name] = tuple(values.get(name, ()))
    values["strategies"] = tuple(
        Strategy(**{**s, "recompute": Recompute(s["recompute"])}) for s in values["strategies"]
    )
    return Stage(**values)
