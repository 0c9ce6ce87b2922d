"""Plain parallel settings, and plans, as recipes: the arguments that say them, read like those of a file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uniap_tune.cost.runtime import overlaps_tensor
from uniap_tune.errors import InputError
from uniap_tune.megatron.facts import SHARDING_OF_ZERO
from uniap_tune.recipe import Recipe
from uniap_tune.render.layout import pipeline_arguments
from uniap_tune.render.megatron import megatron_launch
from uniap_tune.render.megatron_model import model_arguments
from uniap_tune.render.shell import Variable, number
from uniap_tune.spec import Cluster, DType, Job, Model
from uniap_tune.strategy import Target
from uniap_tune.targets import require_supported

from .argument_list import parse_argument_list
from .plan_json import PlanFile
from .source_text import SourceFile

_COUNTS = ("pp", "tp", "cp", "dp", "ep", "etp", "vpp", "mbs")
_SWITCHES = ("sp", "overlap")
NAMES = (*_COUNTS, "zero", "recompute", "layers", *_SWITCHES)
_MODES = ("none", "selective", "full")
# What DeepSpeed's side of the engines has no word for.
_MEGATRON_ONLY = ("cp", "ep", "etp", "vpp", "layers", "sp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Parallel settings.

    Attributes:
        counts: degrees and the micro-batch by name; what is not given is 1.
        zero: the ZeRO stage.
        recompute: ``none``, ``selective``, ``full`` or how many leading layers of each chunk.
        layers: transformer layers of each stage; empty: even.
        sequence_parallel, overlap: ``None``: not said.
    """

    counts: Mapping[str, int]
    zero: int = 0
    recompute: str = "none"
    layers: tuple[int, ...] = ()
    sequence_parallel: bool | None = None
    overlap: bool | None = None

    def count(self, name: str) -> int:
        """A degree, or the micro-batch."""
        return self.counts.get(name, 1)


def parse_settings(pairs: Mapping[str, str]) -> Settings:
    """``{"tp": "2", "recompute": "none", …}`` as settings.

    Raises:
        InputError: an unknown name, or a value that is none.
    """
    counts: dict[str, int] = {}
    others: dict[str, Any] = {}
    for name, text in pairs.items():
        if name not in NAMES:
            raise InputError(f"--set {name}: no such setting", why=f"they are {', '.join(NAMES)}", fix="correct it")
        if name in _COUNTS:
            counts[name] = _whole(name, text, least=1)
        elif name == "zero":
            others[name] = _whole(name, text, least=0, most=3)
        elif name == "recompute":
            others[name] = text if text in _MODES else str(_whole(name, text, least=1))
        elif name == "layers":
            others[name] = tuple(_whole(name, part, least=0) for part in text.split(","))
        else:
            if text not in ("on", "off"):
                raise InputError(f"--set {name}={text}: must be on or off", fix=f"e.g. {name}=on")
            others["sequence_parallel" if name == "sp" else name] = text == "on"
    return Settings(counts=counts, **others)


def _whole(name: str, text: str, *, least: int, most: int = 10**6) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not least <= int(text) <= most:
        forms = f"{', '.join(_MODES)} or a number of layers" if name == "recompute" else f"a whole number from {least}"
        raise InputError(f"--set {name}={text}: must be {forms}", fix="correct it")
    return int(text)


def data_parallel(settings: Settings, cluster: Cluster) -> int:
    """The data-parallel degree that the others leave, which a given one must agree with.

    Raises:
        InputError: the degrees do not make up the cluster.
    """
    devices = cluster.num_devices
    others = settings.count("tp") * settings.count("pp") * settings.count("cp")
    given = settings.counts.get("dp")
    if devices % others or (given is not None and given * others != devices):
        product = " x ".join(
            f"{name} {settings.count(name)}" for name in ("tp", "pp", "cp", "dp") if name in settings.counts
        )
        raise InputError(
            f"--set: {product} is not the {devices} devices of {cluster.name}",
            why="tp x pp x cp x dp must be their number",
            fix="correct a degree, or leave out dp",
        )
    return devices // others


def settings_recipe(model: Model, cluster: Cluster, job: Job, settings: Settings) -> Recipe:
    """Settings as a Megatron recipe.

    Raises:
        InputError: Megatron cannot train the model, or settings that go with no cluster.
    """
    require_supported(model, job, Target.MEGATRON)
    data_parallel(settings, cluster)
    tp, parallel = settings.count("tp"), settings.overlap is not False
    arguments: dict[str, Any] = model_arguments(model, job, tp) | _precision(job)
    arguments |= {"--tensor-model-parallel-size": tp, "--context-parallel-size": settings.count("cp")}
    arguments |= _pipeline(settings, model)
    if model.moe is not None:
        arguments |= {"--expert-model-parallel-size": settings.count("ep")}
        arguments |= {"--expert-tensor-parallel-size": settings.counts.get("etp", tp)}
    elif settings.count("ep") * settings.count("etp") > 1:
        raise InputError(f"--set ep: {model.name} has no experts", fix="leave out ep and etp")
    if tp > 1 and settings.sequence_parallel is not False:
        arguments["--sequence-parallel"] = True
        if parallel and overlaps_tensor(model, cluster, tp):
            arguments["--tp-comm-overlap"] = True
    arguments |= {"--micro-batch-size": settings.count("mbs"), "--global-batch-size": job.global_batch}
    arguments |= _sharding(settings, overlap=parallel) | _recompute(settings)
    recipe = _listed("settings", arguments, model, job)
    assumed = [
        key
        for key, said, matters in (
            ("sp", settings.sequence_parallel, tp > 1),
            ("overlap", settings.overlap, data_parallel(settings, cluster) > 1 or "--tp-comm-overlap" in arguments),
        )
        if said is None and matters
    ]
    note = f"--set {' --set '.join(f'{key}=on' for key in assumed)}, as `plan` has it" if assumed else ""
    return replace(recipe, manages_environment=True, notes=(note,) if note else ())


def plan_recipe(file: PlanFile, name: str) -> Recipe:
    """A plan for Megatron as a recipe, with the environment of its launch files.

    Raises:
        UnsupportedError: Megatron cannot run it.
    """
    launch = megatron_launch(file.plan, file.model, file.cluster, file.job)
    environment = {key: value for key, value in launch.environment.items() if value is not None}
    recipe = _listed(name, launch.arguments, file.model, file.job)
    return replace(recipe, environment=environment)


def _listed(name: str, arguments: Mapping[str, Any], model: Model, job: Job) -> Recipe:
    """The recipe of arguments. Model and job are the given ones, which arguments may not say to the last digit."""
    words = []
    for flag, value in arguments.items():
        plain = value.default if isinstance(value, Variable) else value
        words += [flag] if plain is True else [flag, shlex.quote(number(plain))]
    recipe = parse_argument_list(SourceFile(Path(name), " ".join(words) + "\n"))
    return replace(recipe, model=model, job=job, notes=())


def _precision(job: Job) -> dict[str, Any]:
    precision = job.precision
    if precision.compute is DType.FP32:
        return {}
    half = "--fp16" if precision.compute is DType.FP16 else "--bf16"
    return {half: True} | ({"--grad-reduce-in-bf16": True} if precision.gradient_bytes == 2 else {})


def _pipeline(settings: Settings, model: Model) -> dict[str, Any]:
    pp, vpp = settings.count("pp"), settings.count("vpp")
    if settings.layers:
        if len(settings.layers) != pp or vpp > 1 or sum(settings.layers) != model.num_layers:
            raise InputError(
                f"--set layers={','.join(map(str, settings.layers))}: must be {pp} counts that add up to "
                f"{model.num_layers}, without vpp",
                fix="give the transformer layers of each stage",
            )
        return dict(pipeline_arguments(settings.layers, model.mtp_layers))
    arguments: dict[str, Any] = {"--pipeline-model-parallel-size": pp}
    if vpp > 1:
        arguments["--num-virtual-stages-per-pipeline-rank"] = vpp
    return arguments


def _sharding(settings: Settings, *, overlap: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"--overlap-grad-reduce": True} if overlap else {}
    if settings.zero:
        arguments["--use-distributed-optimizer"] = True
        if overlap:
            arguments["--overlap-param-gather"] = True
    if settings.zero > 1:
        arguments |= {"--use-megatron-fsdp": True, "--data-parallel-sharding-strategy": SHARDING_OF_ZERO[settings.zero]}
        arguments |= {"--ckpt-format": "fsdp_dtensor", "--no-gradient-accumulation-fusion": True}
    return arguments


def _recompute(settings: Settings) -> dict[str, Any]:
    mode = settings.recompute
    if mode == "none":
        return {}
    if mode == "selective":
        return {"--recompute-granularity": "selective"}
    full = {"--recompute-granularity": "full"}
    if mode == "full":
        return full | {"--recompute-method": "uniform", "--recompute-num-layers": 1}
    return full | {"--recompute-method": "block", "--recompute-num-layers": mode}


def deepspeed_values(settings: Settings, job: Job) -> dict[str, Any]:
    """Settings as a DeepSpeed JSON; the pipeline is the script's.

    Raises:
        InputError: a setting DeepSpeed has no word for.
    """
    for name in _MEGATRON_ONLY:
        said = {"layers": bool(settings.layers), "sp": settings.sequence_parallel is not None}
        if settings.count(name) > 1 or said.get(name, False):
            raise InputError(f"--set {name}: DeepSpeed has no such setting", fix="leave it out, or --target megatron")
    values: dict[str, Any] = {"train_micro_batch_size_per_gpu": settings.count("mbs")}
    values["zero_optimization"] = {"stage": settings.zero}
    if settings.zero in (1, 2) and settings.count("pp") == 1:
        values["zero_optimization"]["overlap_comm"] = settings.overlap is not False
    if settings.count("tp") > 1:
        values["tensor_parallel"] = {"autotp_size": settings.count("tp")}
    if job.precision.compute is not DType.FP32:
        values["fp16" if job.precision.compute is DType.FP16 else "bf16"] = {"enabled": True}
    return values
