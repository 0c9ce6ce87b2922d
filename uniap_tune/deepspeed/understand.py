"""What a ``deepspeed`` command means to the planner: the model, the cluster, the job, and what the script can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uniap_tune.adapters import deepspeed as ds_json
from uniap_tune.adapters.registry import read_model
from uniap_tune.deepspeed.launch import Command, ConfigArgument, config_argument, script_mentions, value_of
from uniap_tune.deepspeed.options import Options, read_options
from uniap_tune.deepspeed.resources import Runner, Shape, find_cluster
from uniap_tune.errors import InputError
from uniap_tune.planner import Request
from uniap_tune.space import Knobs
from uniap_tune.spec import DType, Job, Model, Precision, Recompute
from uniap_tune.strategy import Target

_MODEL_ARGUMENTS = ("--model_name_or_path", "--config_name", "--model_name")
_LENGTH_ARGUMENTS = (
    "--seq_length", "--seq-length", "--max_seq_length", "--max_length", "--block_size", "--model_max_length",
    "--cutoff_len", "--sequence_length",
)  # fmt: skip
_TRAINER_ARGUMENTS = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
_PIPELINE_NAMES = ("PipelineModule", "pipeline_module")
_RECOMPUTE_NAMES = ("gradient_checkpointing_enable", "checkpoint_sequential", "checkpointing")
# What the Trainer of transformers uses when its arguments do not say (training_args.py).
_TRAINER_MICRO_BATCH = 8

_NO_TENSOR = 'off (the JSON has no "tensor_parallel" section)'


@dataclass(frozen=True, slots=True, kw_only=True)
class Understanding:
    """What was understood.

    Attributes:
        request: what to plan.
        options: the ``uniap`` block and arguments.
        values: the user's JSON.
        config: where the command has it.
        shape: the devices and where they come from.
        trainer: the script uses the Trainer of transformers.
        pipeline: the script builds a ``PipelineModule``.
        notes: how each was found, as (name, sentence).
    """

    request: Request
    options: Options
    values: Mapping[str, Any]
    config: ConfigArgument
    shape: Shape
    trainer: bool
    pipeline: bool
    notes: tuple[tuple[str, str], ...]


def uniap_block(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The object with the planner's settings: ``autotuning.uniap``, else ``uniap`` at the top."""
    tuning = ds_json.section(values, "autotuning", where)
    return ds_json.section(tuning, "uniap", f"{where}: autotuning") or ds_json.section(values, "uniap", where)


def understand(
    command: Command,
    launcher: Any,
    runner: Runner,
    environment: Mapping[str, str],
    *,
    device_count: Callable[[], int],
    launches: bool,
) -> Understanding:
    """Read everything the command refers to.

    Args:
        command: the command, taken apart.
        launcher: what DeepSpeed's parser made of it.
        runner: DeepSpeed's launcher module.
        environment: variables of the process.
        device_count: counts this machine's devices.
        launches: the training will be started.

    Raises:
        InputError: something is missing, unreadable or contradictory; says how to give it.
    """
    config = config_argument(command.arguments)
    where = str(config.path)
    values = ds_json.read_config(config.path)
    options = read_options(uniap_block(values, where), command.flags, where)
    trainer = config.trainer or value_of(command.arguments, *_TRAINER_ARGUMENTS) is not None
    cluster, shape = find_cluster(
        launcher, options.cluster, runner, environment, device_count=device_count, launches=launches
    )
    pipeline, pipeline_source = _pipeline(command, options, values, trainer)
    model, model_source = _model(command, options)
    job, job_notes = _job(command, options, values, where, shape.world_size, trainer=trainer, pipeline=pipeline)
    tensor = options.tensor if options.tensor is not None else values.get("tensor_parallel") is not None
    request = Request(
        model=model,
        cluster=cluster,
        job=job,
        target=Target.DEEPSPEED,
        knobs=_knobs(options.knobs(), pipeline=pipeline, tensor=tensor, forbidden=ds_json.forbidden_zero(values)),
        memory_fraction=options.memory_fraction,
    )
    notes = (
        ("model", f"{model.name}, {model.num_layers} layers ({model_source})"),
        ("devices", f"{shape.nodes} x {shape.devices} {cluster.device.name} ({shape.source})"),
        ("script", f"{'transformers Trainer' if trainer else 'deepspeed.initialize'}; {pipeline_source}"),
        *job_notes,
        ("tensor", f"tensor parallelism {'allowed' if tensor else _NO_TENSOR}"),
    )
    return Understanding(
        request=request,
        options=options,
        values=values,
        config=config,
        shape=shape,
        trainer=trainer,
        pipeline=pipeline,
        notes=notes,
    )


def _job(
    command: Command,
    options: Options,
    values: Mapping[str, Any],
    where: str,
    world_size: int,
    *,
    trainer: bool,
    pipeline: bool,
) -> tuple[Job, tuple[tuple[str, str], ...]]:
    """How the model is trained, and how that was found."""
    length, length_source = _length(command, options)
    batch, batch_source = _batch(command, options, values, where, world_size, trainer)
    modes, recompute_source = _recompute(command, options, trainer=trainer, pipeline=pipeline)
    job = Job(
        global_batch=batch,
        seq_length=length,
        precision=ds_json.precision(values, where) or _trainer_precision(command),
        optimizer=ds_json.optimizer(values, where),
        allowed_recompute=modes,
    )
    return job, (
        ("batch", f"{batch} samples of {length} tokens ({batch_source}; {length_source})"),
        ("numbers", f"{job.precision.compute}, {job.optimizer} ({where})"),
        ("recompute", recompute_source),
    )


def _model(command: Command, options: Options) -> tuple[Model, str]:
    if options.model is not None:
        return read_model(options.model), "uniap.model"
    how = 'add "autotuning": {"uniap": {"model": "MODEL"}} to the JSON, or --uniap_model MODEL to the command'
    for name in _MODEL_ARGUMENTS:
        given = value_of(command.arguments, name)
        if given is None:
            continue
        try:
            return read_model(given), name
        except InputError as error:
            raise InputError(
                f"{name} {given}: {error.what}",
                why=error.why,
                fix=f"{how}: a config.json, a folder holding one, or a shipped name",
            ) from None
    raise InputError(
        "which model the script trains is not known",
        why=f"neither uniap.model nor {' nor '.join(_MODEL_ARGUMENTS)} is given",
        fix=f"{how}: a config.json, a folder holding one, or a shipped name",
    )


def _length(command: Command, options: Options) -> tuple[int, str]:
    if options.seq_length is not None:
        return options.seq_length, "uniap.seq_length"
    for name in _LENGTH_ARGUMENTS:
        text = value_of(command.arguments, name)
        if text is not None and text.isascii() and text.isdecimal() and int(text) > 0:
            return int(text), name
    raise InputError(
        "the sequence length is not known",
        why=f"neither uniap.seq_length nor one of {', '.join(_LENGTH_ARGUMENTS)} is given",
        fix='add "seq_length": N to the uniap block of the JSON, or --uniap_seq_length N',
    )


def _batch(
    command: Command, options: Options, values: Mapping[str, Any], where: str, world_size: int, trainer: bool
) -> tuple[int, str]:
    if options.global_batch is not None:
        return options.global_batch, "uniap.global_batch"
    given = ds_json.global_batch(values, where, world_size)
    if given is not None:
        source = (
            "train_batch_size" if ds_json.whole(values, "train_batch_size", where) else "micro-batch x accumulation"
        )
        return given, f"{where}: {source}"
    if trainer:
        counts = [value_of(command.arguments, name) for name in _TRAINER_ARGUMENTS]
        numbers = [int(text) if text is not None and text.isdecimal() else None for text in counts]
        micro, steps = numbers[0] or _TRAINER_MICRO_BATCH, numbers[1] or 1
        return micro * steps * world_size, f"{micro} x {steps} x {world_size} of the Trainer's arguments"
    raise InputError(
        f"{where}: the global batch is not known",
        why="it has no train_batch_size and no train_micro_batch_size_per_gpu",
        fix='add "train_batch_size", or "global_batch" to the uniap block',
    )


def _trainer_precision(command: Command) -> Precision:
    """The precision of ``"auto"``: what the Trainer's switches say."""
    for name, dtype in (("--bf16", DType.BF16), ("--fp16", DType.FP16)):
        switched_off = (value_of(command.arguments, name) or "").lower() in ("false", "0")
        if not switched_off and any(word == name or word.startswith(f"{name}=") for word in command.arguments):
            return Precision(compute=dtype)
    return Precision(compute=DType.FP32)


def _pipeline(command: Command, options: Options, values: Mapping[str, Any], trainer: bool) -> tuple[bool, str]:
    if options.pipeline is not None:
        return options.pipeline, f"uniap.pipeline is {str(options.pipeline).lower()}"
    if "pp" in options.knobs().fix:
        return options.knobs().fix["pp"] != "1", "pp is fixed"
    if isinstance(values.get("pipeline"), dict):
        return True, "the JSON has a pipeline section"
    if trainer:
        return False, "no pipeline: the Trainer has none"
    for name in _PIPELINE_NAMES:
        if script_mentions(command, name):
            return True, f"it builds a pipeline ({name})"
    return False, "no pipeline: it does not mention PipelineModule"


def _recompute(
    command: Command, options: Options, *, trainer: bool, pipeline: bool
) -> tuple[frozenset[Recompute], str]:
    """Which recompute modes may be planned. DeepSpeed's JSON cannot switch it on, the script does or does not."""
    knobs = options.knobs()
    if trainer or pipeline:
        return frozenset(Recompute), "as planned"
    if "recompute" in knobs.fix or any(knob == "recompute" for knob, _ in knobs.forbid):
        return frozenset(Recompute), "as the knobs say; the script must do it"
    if any(script_mentions(command, name) for name in _RECOMPUTE_NAMES):
        return frozenset({Recompute.FULL}), "full, because the script checkpoints activations"
    return frozenset({Recompute.NONE}), "none, because the script does not checkpoint activations"


def _knobs(given: Knobs, *, pipeline: bool, tensor: bool, forbidden: frozenset[int]) -> Knobs:
    """The user's knobs and what the script and its JSON can run."""
    maximum = dict(given.maximum)
    fix = dict(given.fix)
    ruled_out = set(forbidden)
    if pipeline:
        ruled_out |= {2, 3}  # DeepSpeed's pipeline engine refuses them, with one stage too
    else:
        fix.setdefault("pp", "1")
    if (pipeline or not tensor) and "tp" not in fix and "tp" not in maximum:
        maximum["tp"] = 1
    barred = {("zero", str(stage)) for stage in ruled_out}
    return replace(given, fix=fix, maximum=maximum, forbid=given.forbid | barred)


def results_folder(values: Mapping[str, Any], where: str) -> Path:
    """Where results go: ``autotuning.results_dir``, by default as DeepSpeed's own tuner."""
    name = ds_json.section(values, "autotuning", where).get("results_dir", "autotuning_results")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: autotuning.results_dir must be a path", fix="correct it")
    return Path(name)
