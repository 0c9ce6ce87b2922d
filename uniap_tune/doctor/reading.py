"""What ``doctor`` is given, as a setup: a recipe, a plan, a DeepSpeed JSON with its model, or plain settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from uniap_tune.adapters import deepspeed as ds_json
from uniap_tune.adapters.documents import printable
from uniap_tune.adapters.plan_json import is_plan, plan_file
from uniap_tune.adapters.recipes import ReadOptions, read_recipe
from uniap_tune.adapters.settings import (
    Settings,
    data_parallel,
    deepspeed_values,
    parse_settings,
    plan_recipe,
    settings_recipe,
)
from uniap_tune.deepspeed.check import tensor_size
from uniap_tune.deepspeed.pipeline import read_split
from uniap_tune.doctor.deepspeed import DeepSpeedSetup
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.doctor.setup import SETTINGS, Setup
from uniap_tune.errors import InputError
from uniap_tune.render.deepspeed import deepspeed_config, pipeline_split
from uniap_tune.spec import Cluster, Job, Model, OptimizerName, Precision, Recompute
from uniap_tune.strategy import Target
from uniap_tune.targets import require_supported

_SPLIT = "pipeline_split.json"
_JSON, _PLAN = "DeepSpeed JSON", "plan"
# What may be set beside a DeepSpeed JSON: the script decides it.
_SCRIPT_SETTINGS = ("pp", "recompute", "mbs")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What was said besides the recipe; ``None``: nothing.

    Attributes:
        cluster: where; a plan has its own.
        model, global_batch, seq_length, precision, optimizer, flash_attention: the job, where the recipe is silent.
        target: the engine of plain settings.
        pairs: ``--set``, by name.
        overrides, execute: how to read a recipe.
    """

    cluster: Cluster | None = None
    model: Model | None = None
    global_batch: int | None = None
    seq_length: int | None = None
    precision: Precision = field(default_factory=Precision)
    optimizer: OptimizerName = OptimizerName.ADAM
    flash_attention: bool = True
    target: Target = Target.MEGATRON
    pairs: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    execute: bool = False


def read_setup(recipe: str | None, given: Given) -> Setup:
    """The setup.

    Args:
        recipe: the file; ``None``: only settings are given.
        given: what else is known.

    Raises:
        InputError: unreadable, contradictory, or something is missing; says how to give it.
    """
    if recipe is None:
        return _from_settings(given)
    if (Path(recipe) / "plan.json").is_file():  # the folder that `plan -o` wrote
        recipe = str(Path(recipe) / "plan.json")
    if recipe.lower().endswith(".json"):
        values, where = ds_json.read_config(Path(recipe)), printable(recipe)
        return _from_plan(values, where, given) if is_plan(values) else _from_json(values, Path(recipe), where, given)
    for option, value in (
        ("--model", given.model),
        ("--global-batch", given.global_batch),
        ("--seq-length", given.seq_length),
    ):
        if value is not None:
            raise InputError(f"{option}: {printable(recipe)} says that itself", fix=f"leave out {option}")
    options = ReadOptions(given=given.pairs, overrides=given.overrides, execute=given.execute)
    found = read_recipe(recipe, options)
    require_supported(found.model, found.job, Target.MEGATRON)  # other models have layers that are not priced here
    return MegatronSetup(recipe=found, cluster=_required(given.cluster, "--cluster"))


def _required(value: _T | None, option: str, why: str = "") -> _T:
    if value is None:
        raise InputError(f"{option} is not given", why=why, fix=f"add {option}")
    return value


def _job(given: Given, global_batch: int | None = None) -> Job:
    why = "without a recipe that says it, the job must be given"
    return Job(
        global_batch=global_batch or _required(given.global_batch, "--global-batch", why),
        seq_length=_required(given.seq_length, "--seq-length", why),
        precision=given.precision,
        optimizer=given.optimizer,
        flash_attention=given.flash_attention,
    )


def _from_settings(given: Given) -> Setup:
    model = _required(given.model, "--model", "there is no RECIPE to read it from")
    cluster, job, settings = _required(given.cluster, "--cluster"), _job(given), parse_settings(given.pairs)
    if given.target is Target.MEGATRON:
        return MegatronSetup(recipe=settings_recipe(model, cluster, job, settings), cluster=cluster)
    require_supported(model, job, Target.DEEPSPEED)
    data_parallel(settings, cluster)
    return DeepSpeedSetup(
        name="settings",
        format=SETTINGS,
        model=model,
        cluster=cluster,
        job=job,
        values=deepspeed_values(settings, job),
        micro_batch=settings.count("mbs"),
        pp=settings.count("pp"),
        recompute=_checkpoints(settings),
    )


def _checkpoints(settings: Settings) -> bool:
    """Whether every layer is recomputed.

    Raises:
        InputError: only some of them are, which DeepSpeed does not do.
    """
    mode = settings.recompute
    if mode not in ("none", "full"):
        raise InputError(f"--set recompute={mode}: DeepSpeed checkpoints all layers or none", fix="give none or full")
    return mode == "full"


def _from_plan(values: Mapping[str, Any], where: str, given: Given) -> Setup:
    if given.pairs or given.model is not None or given.global_batch or given.seq_length:
        raise InputError(f"{where}: a plan says everything itself", fix="leave out --set, --model and the job")
    file = plan_file(values, where)
    plan, cluster = file.plan, given.cluster or file.cluster
    if plan.target is Target.MEGATRON:
        return MegatronSetup(recipe=plan_recipe(file, where), cluster=cluster)
    if plan.target is not Target.DEEPSPEED:
        raise InputError(
            f"{where}: no engine runs a plan with its own strategy for each layer",
            why=f"its target is {plan.target}",
            fix="plan with --target megatron or --target deepspeed",
        )
    modes = {strategy.recompute for strategy in plan.strategies}
    return DeepSpeedSetup(
        name=where,
        format=_PLAN,
        model=file.model,
        cluster=cluster,
        job=file.job,
        values=deepspeed_config(plan, file.model, file.job),
        micro_batch=plan.micro_batch_size,
        pp=plan.pp,
        parts=tuple(pipeline_split(plan)["parts"]) if plan.pp > 1 else (),
        recompute=Recompute.FULL in modes,
    )


def _from_json(values: Mapping[str, Any], path: Path, where: str, given: Given) -> Setup:
    """A DeepSpeed JSON. It says nothing of the model, the length of samples and checkpointing."""
    if "zero_optimization" not in values and not any(key in values for key in ds_json.BATCH_KEYS):
        raise InputError(
            f"{where}: neither a DeepSpeed JSON nor a plan",
            why="it has no zero_optimization and no batch",
            fix="give a model's config.json with --model",
        )
    unknown = next((name for name in given.pairs if name not in _SCRIPT_SETTINGS), None)
    if unknown is not None:
        raise InputError(
            f"--set {unknown}: {where} decides it",
            why=f"only {', '.join(_SCRIPT_SETTINGS)} are left open",
            fix="edit the file instead",
        )
    why = "a DeepSpeed JSON does not say it"
    model = _required(given.model, "--model", why)
    cluster = _required(given.cluster, "--cluster")
    settings = parse_settings(given.pairs)
    pp, parts, recompute, notes = _pipeline(values, path, where, given)
    batch, micro = _batch(values, where, given, cluster.num_devices // pp, settings.counts.get("mbs"))
    job = _job(given, batch)
    if "recompute" in given.pairs:
        recompute = _checkpoints(settings)
    elif pp == 1:
        notes.append("activation checkpointing is in the script: taken as off; --set recompute=full if it is on")
    return DeepSpeedSetup(
        name=where,
        format=_JSON,
        model=model,
        cluster=cluster,
        job=replace(
            job,
            precision=ds_json.precision(values, where) or given.precision,
            optimizer=ds_json.optimizer(values, where),
        ),
        values=values,
        micro_batch=micro,
        pp=pp,
        parts=parts,
        recompute=recompute,
        notes=tuple(notes),
    )


def _batch(
    values: Mapping[str, Any], where: str, given: Given, devices: int, micro_batch: int | None
) -> tuple[int | None, int]:
    """Samples of a step (``None``: not known) and of a micro-batch; what is not said follows from the rest.

    Args:
        values, where: the JSON and its name.
        given: what was said besides.
        devices: those of a stage.
        micro_batch: the one set beside the JSON.
    """
    batch = given.global_batch or ds_json.global_batch(values, where, devices)
    micro = ds_json.whole(values, ds_json.BATCH_KEYS[1], where) or micro_batch
    steps = ds_json.whole(values, ds_json.BATCH_KEYS[2], where) or 1
    dp = max(1, devices // tensor_size(values))
    if micro is None:
        micro = max(1, batch // (steps * dp)) if batch is not None else 1
    elif batch is None:
        batch = micro * steps * dp
    return batch, micro


def _pipeline(
    values: Mapping[str, Any], path: Path, where: str, given: Given
) -> tuple[int, tuple[int, ...], bool, list[str]]:
    """Stages, their bounds and checkpointing: as set, of a split beside the file, or what the JSON says."""
    section = ds_json.section(values, "pipeline", where)
    recompute = bool(section.get("activation_checkpoint_interval"))
    if "pp" in given.pairs:
        return parse_settings({"pp": given.pairs["pp"]}).count("pp"), (), recompute, []
    beside = path.parent / _SPLIT
    if beside.exists():
        split = read_split(beside)
        return split.num_stages, split.parts, split.interval > 0, [f"the pipeline is that of {printable(str(beside))}"]
    stages = ds_json.whole(section, "stages", where)
    if stages is not None:
        return stages, (), recompute, ["stages are taken from pipeline.stages, which DeepSpeed itself ignores"]
    if section:
        raise InputError(
            f"{where}: how many stages the pipeline has is not known",
            why="the script says it: PipelineModule(num_stages=…)",
            fix="give it with --set pp=N (1 without a pipeline)",
        )
    return 1, (), recompute, []
