"""The software a measurement record ran on, from its words, and what that means for how a step is executed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto

from uniap_tune.cost.runtime import (
    ENGINE_LOSS,
    MEGATRON_2021,
    MEGATRON_DEEPSPEED_2023,
    NEMO_2024,
    PYTORCH_FSDP,
    Runtime,
    transformers_runtime,
)
from uniap_tune.spec import DType, Model
from uniap_tune.strategy import CAPABILITIES, Capabilities, Target

from .record_fields import Fields, flag, mapping, names, text

_STATED = ("framework", "engine", "software")
_RECIPE_WORDS = ("megatron-bridge", "nemo")
_TRANSFORMERS_WORDS = ("transformers", "hugging", "accelerate", "axolotl")
_PYTORCH_WORDS = ("pytorch", "torchtitan", "foundry", "fairscale", "lightning")
# "2022", or a release by year and month: "22.08"
_YEAR = re.compile(r"\b20(\d\d)\b|(?<![\d.])(19|[23]\d)\.(?:0[1-9]|1[0-2])\b")
_FUSED_SINCE = 23  # Megatron-LM with TransformerEngine, FlashAttention and sequence parallelism: the years after 2022


class Engine(Enum):
    """What executes the training step; ``BRIDGE`` and ``NEMO`` are NVIDIA's recipes, whose defaults differ from those
    of Megatron-LM's command line."""

    MEGATRON = auto()
    BRIDGE = auto()
    NEMO = auto()
    MEGATRON_DEEPSPEED = auto()
    PYTORCH = auto()
    TRANSFORMERS = auto()


@dataclass(frozen=True, slots=True)
class Software:
    """An engine, whether it is as it was before 2023, and whether operators are compiled."""

    engine: Engine
    old: bool
    compiled: bool

    @property
    def recipes(self) -> bool:
        """Whether NVIDIA's recipes ran it."""
        return self.engine in (Engine.BRIDGE, Engine.NEMO)


def read_software(record: Fields, dtype: DType) -> Software:
    """The software of a record. Its age is that of the year it names; where it names none, fp16 is taken for the years
    before 2023."""
    stated = " ".join(text(record, key) for key in _STATED).lower()
    words = f"{stated} {text(record, 'hardware')} {text(record, 'precision')}".lower()
    engine = _engine(words, f"{words} {text(record, 'source')}".lower())
    year = _YEAR.search(stated)
    old = dtype is DType.FP16 if year is None else int(year.group(1) or year.group(2)) < _FUSED_SINCE
    return Software(engine, old and engine is not Engine.TRANSFORMERS, "compile" in words)


def _engine(words: str, sourced: str) -> Engine:
    if any(word in words for word in _TRANSFORMERS_WORDS) or ("deepspeed" in words and "megatron" not in words):
        return Engine.TRANSFORMERS
    if any(word in words for word in _PYTORCH_WORDS):
        return Engine.PYTORCH
    if any(word in sourced for word in _RECIPE_WORDS):
        return Engine.BRIDGE if "bridge" in sourced else Engine.NEMO
    return Engine.MEGATRON_DEEPSPEED if "deepspeed" in words else Engine.MEGATRON


def read_capabilities(record: Fields, software: Software) -> Capabilities:
    """DeepSpeed's of transformers' models, else Megatron's. Whether gradients are reduced (by Megatron, parameters
    gathered too) behind computation: as the record says, else as DeepSpeed's plans and the recipes of Megatron-Bridge
    and NeMo do, and Megatron-LM's command line and NeMo before 2023 (``overlap_grad_sync: False``) do not."""
    stated = flag(record, "overlap_grad_reduce")
    if software.engine is Engine.TRANSFORMERS:
        return replace(CAPABILITIES[Target.DEEPSPEED], overlap_gradient_reduce=stated is not False)
    overlaps = software.recipes and not software.old if stated is None else stated
    engine = CAPABILITIES[Target.MEGATRON]
    return replace(engine, overlap_gradient_reduce=overlaps, overlap_param_gather=overlaps)


def read_runtime(record: Fields, software: Software, model: Model) -> Runtime:
    """How that software executes a step of a model, with what the record's ``settings`` say of it."""
    if software.engine is Engine.TRANSFORMERS:
        return replace(transformers_runtime(model), eager=not software.compiled)
    if software.engine is Engine.PYTORCH:
        return replace(PYTORCH_FSDP, eager=not software.compiled)
    if software.old:
        engine = MEGATRON_DEEPSPEED_2023 if software.engine is Engine.MEGATRON_DEEPSPEED else MEGATRON_2021
        # a planner that cuts between operators keeps what each of them hands on
        return replace(engine, keeps_scores=record.get("ops_per_stage") is not None)
    settings = mapping(record, "settings") or {}
    return replace(
        NEMO_2024 if software.engine is Engine.NEMO else _present(settings, recipes=software.recipes),
        cuda_graphs=_replays_steps(settings),
        overlap_experts=bool(flag(settings, "moe_a2a_overlap")),
        overlap_tensor=software.recipes and model.moe is None,
    )


def _present(settings: Fields, *, recipes: bool) -> Runtime:
    """Megatron-LM of today, with TransformerEngine's loss; the recipes of Megatron-Bridge keep 8- and 4-bit parameters
    alone (perf_recipes/_common.py, mixed_precision.py)."""
    modules = settings.get("offload_modules")
    return Runtime(
        loss=ENGINE_LOSS,
        narrow_parameters=recipes,
        offload_modules=frozenset(names(modules)) if isinstance(modules, list) else frozenset(),
    )


def _replays_steps(settings: Fields) -> bool:
    """Whether whole iterations are CUDA graphs."""
    implementation = text(settings, "cuda_graph_impl")
    scope = settings.get("cuda_graph_scope")
    scopes = names(scope) if isinstance(scope, list) else [str(scope)]
    return implementation != "none" and (implementation in ("local", "full_iteration") or "full_iteration" in scopes)
