"""The solver's split in DeepSpeed's ``PipelineModule``, for which DeepSpeed's JSON has no key.

A plan cuts the embedding, the transformer blocks and the head. A script may have more layers around its blocks (a
position embedding, a final norm, a function that reshapes); what comes before the first block belongs to the embedding,
what comes after the last to the head.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from uniap_tune.errors import InputError

# DeepSpeed's launchers forward variables to other nodes only if their names start so (launcher/runner.py, EXPORT_ENVS).
PLAN_VARIABLE = "PYTHON_UNIAP_TUNE_PLAN"

PlanSource = str | Path | Mapping[str, Any]  # a path, or what is in the file

_FIX = "give plan=… the plan.json or pipeline_split.json that uniap-tune wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where a plan cuts its layers.

    Attributes:
        parts: bounds of the stages, from 0 to ``len(layers)``.
        layers: names of the plan's layers.
        interval: layers between activation checkpoints; 0: none.
    """

    parts: tuple[int, ...]
    layers: tuple[str, ...]
    interval: int

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.parts) - 1

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return sum(name.startswith("layers.") for name in self.layers)


def pipeline_module(layers: Sequence[Any], *, plan: PlanSource | None = None, **options: Any) -> Any:
    """A ``deepspeed.pipe.PipelineModule`` cut and checkpointed as a plan says.

    Args:
        layers: what ``PipelineModule`` takes; one run of layers of a single class are the transformer blocks.
        plan: ``plan.json`` or ``pipeline_split.json`` (a path or its content); by default the file named by the
            environment variable ``PYTHON_UNIAP_TUNE_PLAN``, which ``--autotuning run`` sets.
        options: other arguments of ``PipelineModule``; the number of stages and the interval come from the plan.

    Raises:
        InputError: no plan, or one whose blocks are not among the layers.
    """
    from deepspeed.pipe import PipelineModule

    split = read_split(plan)
    specs = list(layers)
    kinds = [_kind(layer) for layer in specs]
    parts = place(split, kinds)

    class PlannedPipelineModule(PipelineModule):  # type: ignore[misc]
        """Cut where the plan says."""

        def _partition_layers(self, method: str = "uniform") -> None:  # noqa: ARG002 - the plan is the method
            _set_parts(self, parts)

    settings: dict[str, Any] = {"num_stages": split.num_stages} if options.get("topology") is None else {}
    return PlannedPipelineModule(layers=specs, **{**options, **settings, **checkpointing(split, kinds, options)})


def patch_pipeline_module(plan: PlanSource | None = None) -> None:
    """Make every ``PipelineModule`` of this process follow a plan, for scripts that are not to be changed.

    Args:
        plan: as for :func:`pipeline_module`.

    Raises:
        InputError: no plan.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    split = read_split(plan)
    original = PipelineModule.__init__

    def planned_init(self: Any, layers: Any, num_stages: Any = None, topology: Any = None, **options: Any) -> None:
        if topology is None:
            num_stages = split.num_stages
        layers = list(layers)
        options |= checkpointing(split, [_kind(layer) for layer in layers], options)
        original(self, layers=layers, num_stages=num_stages, topology=topology, **options)

    def planned_layers(self: Any, method: str = "uniform") -> None:  # noqa: ARG001 - the plan is the method
        _set_parts(self, place(split, [_kind(layer) for layer in self._layer_specs]))

    PipelineModule.__init__ = planned_init
    PipelineModule._partition_layers = planned_layers


def checkpointing(split: Split, kinds: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by which the plan's blocks are recomputed, if any: else DeepSpeed recomputes every layer that has
    parameters, embedding and head too (runtime/pipe/module.py:683)."""
    found: dict[str, Any] = {"activation_checkpoint_interval": split.interval}
    if split.interval and given.get("checkpointable_layers") is None:
        found["checkpointable_layers"] = [kinds[_only_run(kinds, split.num_blocks)]]
    return found


def read_split(plan: PlanSource | None) -> Split:
    """The split of a plan, from a path, its content, or the file that the environment names.

    Raises:
        InputError: none given, or not a plan.
    """
    if plan is None:
        plan = os.environ.get(PLAN_VARIABLE)
    if not plan:
        raise InputError("no plan for the pipeline", why=f"{PLAN_VARIABLE} is not set", fix=_FIX)
    where, data = ("plan", plan) if isinstance(plan, Mapping) else (str(plan), _load(Path(plan)))
    try:
        if "parts" in data:
            parts, layers, interval = data["parts"], data["layers"], data["activation_checkpoint_interval"]
        else:
            from uniap_tune.plan import plan_from_dict
            from uniap_tune.render.deepspeed import pipeline_split

            made = pipeline_split(plan_from_dict(data, where))
            parts, layers, interval = made["parts"], made["layers"], made["activation_checkpoint_interval"]
        split = Split(parts=tuple(map(int, parts)), layers=tuple(map(str, layers)), interval=int(interval))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a plan: {error}", fix=_FIX) from error
    rising = all(a < b for a, b in pairwise(split.parts))
    if len(split.parts) < 2 or split.parts[0] != 0 or split.parts[-1] != len(split.layers) or not rising:
        raise InputError(f"{where}: parts {list(split.parts)} do not cover {len(split.layers)} layers", fix=_FIX)
    return split


def _load(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read", why=str(error), fix=_FIX) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a plan", fix=_FIX)
    return data


def place(split: Split, kinds: Sequence[str]) -> list[int]:
    """The plan's bounds in a script's own list of layers.

    Args:
        split: the plan's.
        kinds: the class of each of the script's layers.

    Raises:
        InputError: no run of equal layers is as long as the plan has transformer blocks, or several are.
    """
    first_block = next((i for i, name in enumerate(split.layers) if name.startswith("layers.")), 0)
    blocks = split.num_blocks
    start = _only_run(kinds, blocks)
    bounds = [start + bound - first_block for bound in split.parts]
    after = start + blocks
    # A stage without any of the script's layers would be empty, so the cut beside the embedding or the head is kept
    # where the script has such a layer, and refused where it has none.
    placed = [0, *(min(max(bound, start), after) for bound in bounds[1:-1]), len(kinds)]
    if any(a >= b for a, b in pairwise(placed)):
        raise InputError(
            f"the plan's stages {list(split.parts)} leave one of {len(kinds)} layers without any",
            why="the plan has a stage of the embedding or the head alone, which the script does not have as a layer",
            fix="give the embedding and the head as layers of their own",
        )
    return placed


def _only_run(kinds: Sequence[str], blocks: int) -> int:
    """Where the run of ``blocks`` layers of one class starts."""
    runs: list[tuple[int, int]] = []
    start = 0
    for _, group in groupby(kinds):
        length = len(list(group))
        runs.append((start, length))
        start += length
    found = [start for start, length in runs if length == blocks]
    if len(found) != 1:
        lengths = ", ".join(f"{length} x {kinds[start]}" for start, length in runs)[:300]
        raise InputError(
            f"the plan's {blocks} transformer blocks are not among the {len(kinds)} layers of the pipeline",
            why=f"one run of {blocks} layers of a single class is expected; there are {lengths}",
            fix="plan for the model that the script builds, one layer of the pipeline for each transformer block",
        )
    return found[0]


def _kind(layer: Any) -> str:
    kind = getattr(layer, "typename", None) or type(layer)  # LayerSpec keeps its class in typename
    return str(getattr(kind, "__name__", kind))


def _set_parts(module: Any, parts: Sequence[int]) -> None:
    """What ``PipelineModule._partition_layers`` leaves behind, with bounds of our own."""
    if module.num_stages != len(parts) - 1:
        raise InputError(
            f"the pipeline has {module.num_stages} stages, the plan {len(parts) - 1}",
            fix="give the topology as many pipe stages as the plan has",
        )
    module.parts = list(parts)
    stage = module._topo.get_coord(module.global_rank).pipe
    module._set_bounds(start=parts[stage], stop=parts[stage + 1])
