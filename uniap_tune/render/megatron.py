"""Plan -> arguments and environment of Megatron-LM's ``pretrain_gpt.py``, as a script and as a mapping.

Rules cited as ``arg:N`` are lines of megatron/training/arguments.py, as ``TC:N`` of transformer_config.py, both of
Megatron-LM commit d98e8a6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from uniap_tune.cost.runtime import overlaps_tensor
from uniap_tune.errors import UnsupportedError
from uniap_tune.hardware import has_fused_attention
from uniap_tune.megatron.facts import SHARDING_OF_ZERO
from uniap_tune.megatron.mcore import mcore_sections, plain_sections, python_snippet
from uniap_tune.megatron.versions import DEFAULT_VERSION, MegatronVersion, megatron_version, versions_with
from uniap_tune.plan import Plan
from uniap_tune.render.layout import pipeline_arguments
from uniap_tune.render.megatron_model import model_arguments
from uniap_tune.render.shell import Arguments, Value, Variable, comment, script
from uniap_tune.spec import Cluster, DType, Job, Model, OptimizerName, Recompute
from uniap_tune.strategy import Strategy
from uniap_tune.targets import MEGATRON_MOMENTS, notes

# NVIDIA generations from Blackwell on need no single work queue for tensor parallelism (arg:1474).
_BLACKWELL = "blackwell"
# Work queues that keep streams from waiting for each other on Blackwell: the value of Megatron-Bridge's recipes
# for it (src/megatron/bridge/perf_recipes, scripts/performance/utils/overrides.py).
_BLACKWELL_CONNECTIONS = 32

# TransformerEngine needs Volta or later (its README).
_NO_TRANSFORMER_ENGINE = frozenset({"pascal"})

_PRECISION: Mapping[DType, Arguments] = {
    DType.FP32: {},
    DType.FP16: {"--fp16": True},
    DType.BF16: {"--bf16": True},
    # Recipes of megatron/core/fp8_utils.py: current scaling per tensor, and the block-scaled formats of Blackwell.
    DType.FP8: {"--bf16": True, "--fp8-format": "hybrid", "--fp8-recipe": "tensorwise"},
    DType.MXFP8: {"--bf16": True, "--fp8-format": "e4m3", "--fp8-recipe": "mxfp8"},
    DType.NVFP4: {"--bf16": True, "--fp4-format": "e2m1", "--fp4-recipe": "nvfp4"},
}


@dataclass(frozen=True, slots=True)
class MegatronLaunch:
    """Arguments in groups by what they are about, and the environment; ``None`` unsets a variable."""

    groups: Mapping[str, Arguments]
    environment: Mapping[str, str | None]

    @property
    def arguments(self) -> dict[str, Value]:
        """All arguments, in order."""
        return {name: value for group in self.groups.values() for name, value in group.items()}


def megatron_launch(
    plan: Plan, model: Model, cluster: Cluster, job: Job, version: str = DEFAULT_VERSION
) -> MegatronLaunch:
    """What to start ``pretrain_gpt.py`` of a version of Megatron-LM with, data and tokenizer aside.

    Raises:
        UnsupportedError: Megatron cannot run this plan, which says what differs between its layers; or this version
            cannot, which says which can.
    """
    strategy = _one_grid(plan)
    groups: dict[str, Arguments] = {
        "MODEL": model_arguments(model, job, strategy.tp),
        "PARALLEL": _parallel(plan, model, cluster, strategy),
        "BATCH": {"--micro-batch-size": plan.micro_batch_size, "--global-batch-size": job.global_batch},
        "SHARDING": _sharding(strategy),
        "RECOMPUTE": _recompute(plan),
        "PRECISION": _precision(job),
        "KERNELS": _kernels(cluster, job),
        "OPTIMIZER": _optimizer(job, strategy),
        "TRAINING": _training(),
    }
    launch = MegatronLaunch({name: group for name, group in groups.items() if group}, _environment(cluster, strategy))
    _require_known(launch, megatron_version(version))
    return launch


def _require_known(launch: MegatronLaunch, version: MegatronVersion) -> None:
    """Every argument must be one that the version knows."""
    for flag in launch.arguments:
        name = flag.removeprefix("--")
        if name not in version.arguments:
            raise UnsupportedError(
                f"Megatron-LM {version.name} cannot run this plan: it does not know {flag}",
                why=f"its arguments are those of {version.release}",
                fix=" or ".join(f"--megatron-version {known}" for known in versions_with(name)),
            )


def megatron_files(
    plan: Plan, model: Model, cluster: Cluster, job: Job, header: str, version: str = DEFAULT_VERSION
) -> dict[str, str]:
    """``launch.sh``, the same for Slurm, the arguments as YAML, and megatron-core's configuration objects."""
    launch = megatron_launch(plan, model, cluster, job, version)
    null_vocabulary = model.vocab_size - megatron_version(version).null_tokenizer_adds
    text = script(
        "megatron/launch.sh.j2",
        header=header,
        summary=f"{model.name} on {cluster.name}",
        megatron=f"Megatron-LM {version}" if version[0].isdecimal() else "the newest Megatron-LM",
        notes=[*notes(model, job, plan.target), *_kernel_notes(cluster, job, plan.strategies[0])],
        cluster=cluster,
        groups=launch.groups,
        environment=launch.environment,
        null_vocabulary=null_vocabulary,
    )
    data = {"--mock-data": True, "--tokenizer-type": "NullTokenizer", "--vocab-size": null_vocabulary}
    arguments = launch.arguments | data
    document = {
        "ENV_VARS": {name: value for name, value in launch.environment.items() if value is not None},
        "MODEL_ARGS": {name: v.default if isinstance(v, Variable) else v for name, v in arguments.items()},
    }
    heading = f"# {comment(header)}\n# The arguments of launch.sh with its defaults.\n"
    summary = f"{model.name} on {cluster.name}"
    return {
        "launch.sh": text,
        "sbatch.sh": script("megatron/sbatch.sh.j2", header=header, summary=summary, cluster=cluster),
        "megatron_args.yaml": heading + yaml.safe_dump(document, sort_keys=False),
        **_mcore_files(launch, header, interleaved=plan.virtual_stages > 1),
    }


def _mcore_files(launch: MegatronLaunch, header: str, *, interleaved: bool) -> dict[str, str]:
    """Keyword arguments of megatron-core's configuration classes, as YAML and as Python.

    Without overlap of tensor parallelism: training loops other than Megatron-LM's would have to make its user buffers
    first (megatron/training/initialize.py, _initialize_tp_communicators)."""
    values = {
        name.removeprefix("--"): value.default if isinstance(value, Variable) else value
        for name, value in launch.arguments.items()
        if name != "--tp-comm-overlap"
    }
    sections = mcore_sections(values, interleaved=interleaved)
    heading = f"# {comment(header)}\n# Keyword arguments of megatron-core's configuration classes.\n"
    return {
        "mcore.yaml": heading + yaml.safe_dump(plain_sections(sections), sort_keys=False),
        "mcore_config.py": python_snippet(sections, comment(header)),
    }


def _one_grid(plan: Plan) -> Strategy:
    strategy = plan.uniform()
    if strategy is None or len({s.sequence_parallel for s in plan.strategies}) > 1:
        kinds = ", ".join(sorted({s.describe() for s in plan.strategies})[:4])
        raise UnsupportedError(
            "this plan cannot be launched by Megatron",
            why=f"Megatron runs one parallel grid for all layers; the plan has {kinds}",
            fix="plan with --target megatron",
        )
    if plan.schedule != "1f1b":
        raise UnsupportedError(
            f"this plan cannot be launched by Megatron: its schedule is {plan.schedule}",
            why="pretrain_gpt.py runs 1F1B",
            fix="plan with --target megatron",
        )
    return strategy


def _parallel(plan: Plan, model: Model, cluster: Cluster, strategy: Strategy) -> dict[str, Value]:
    arguments: dict[str, Value] = {"--tensor-model-parallel-size": strategy.tp}
    if strategy.sequence_parallel:
        arguments["--sequence-parallel"] = True
        if overlaps_tensor(model, cluster, strategy.tp):
            arguments["--tp-comm-overlap"] = True
    arguments |= pipeline_arguments(list(map(len, plan.virtual_stage_blocks())), model.mtp_layers, plan.virtual_stages)
    if strategy.cp > 1:
        arguments |= {"--context-parallel-size": strategy.cp, "--cp-comm-type": "p2p"}
    if model.moe is not None:
        arguments |= {"--expert-model-parallel-size": strategy.ep, "--expert-tensor-parallel-size": strategy.etp}
    return arguments


def _sharding(strategy: Strategy) -> dict[str, Value]:
    """ZeRO 0 is plain data parallelism, 1 the distributed optimizer, 2 and 3 are Megatron-FSDP."""
    if strategy.dp * strategy.cp == 1:
        return {}
    arguments: dict[str, Value] = {"--overlap-grad-reduce": True}
    if strategy.zero == 0:
        return arguments
    arguments |= {"--use-distributed-optimizer": True, "--overlap-param-gather": True}
    if strategy.zero > 1:
        arguments |= {
            "--use-megatron-fsdp": True,
            "--data-parallel-sharding-strategy": SHARDING_OF_ZERO[strategy.zero],
            "--ckpt-format": "fsdp_dtensor",  # the only one it accepts (arg:1169)
            # Fusion adds weight gradients into the buffers of plain data parallelism, which are not there.
            "--no-gradient-accumulation-fusion": True,
        }
    if strategy.zero == 3:
        arguments["--init-model-with-meta-device"] = True  # else every rank first builds the whole model
    return arguments


def _recompute(plan: Plan) -> dict[str, Value]:
    """One mode for all blocks, or the first N blocks of each model chunk in full: TC:1901 knows nothing in between."""
    chunks = [[s.recompute for s in chunk] for chunk in plan.virtual_stage_blocks()]
    modes = {mode for chunk in chunks for mode in chunk}
    if modes <= {Recompute.NONE}:
        return {}
    if modes == {Recompute.SELECTIVE}:
        return {"--recompute-granularity": "selective"}
    full: dict[str, Value] = {"--recompute-granularity": "full"}
    if modes == {Recompute.FULL}:
        return full | {"--recompute-method": "uniform", "--recompute-num-layers": 1}
    depth = max(chunk.count(Recompute.FULL) for chunk in chunks)
    leading = [[Recompute.FULL] * min(depth, len(c)) + [Recompute.NONE] * max(0, len(c) - depth) for c in chunks]
    if chunks != leading:
        raise UnsupportedError(
            "this plan cannot be launched by Megatron: its recomputation",
            why="Megatron recomputes the first N layers of every stage, or of every virtual stage, the same N for all, "
            "or all layers in one way",
            fix="plan with --target megatron",
        )
    return full | {"--recompute-method": "block", "--recompute-num-layers": depth}


def _precision(job: Job) -> dict[str, Value]:
    precision = job.precision
    arguments = dict(_PRECISION[precision.compute])
    narrow = precision.gradient_bytes == 2
    if precision.compute is DType.FP16 and not narrow:
        arguments["--accumulate-allreduce-grads-in-fp32"] = True
    elif "--bf16" in arguments and narrow:
        arguments["--grad-reduce-in-bf16"] = True  # else Megatron keeps fp32 gradients under bf16
    return arguments


def _has_fused_attention(cluster: Cluster, job: Job) -> bool:
    return job.precision.compute is not DType.FP32 and has_fused_attention(cluster.device)


def _kernels(cluster: Cluster, job: Job) -> dict[str, Value]:
    fused = job.flash_attention and _has_fused_attention(cluster, job)
    arguments: dict[str, Value] = {
        # auto takes the faster of FlashAttention and cuDNN's fused attention, by GPU.
        "--attention-backend": "auto" if fused else "unfused",
        # The dataloader's s x s masks are for padded data; a causal mask needs no tensor.
        "--no-create-attention-mask-in-dataloader": True,
    }
    if cluster.device.generation in _NO_TRANSFORMER_ENGINE:
        arguments |= {
            "--transformer-impl": "local",
            "--no-persist-layer-norm": True,
            "--no-gradient-accumulation-fusion": True,
        }
    return arguments


def _kernel_notes(cluster: Cluster, job: Job, strategy: Strategy) -> Iterator[str]:
    """What the hardware keeps Megatron from doing as planned."""
    device = cluster.device.name
    if job.flash_attention and not _has_fused_attention(cluster, job):
        yield (
            f"there is no fused attention in {job.precision.compute} on {device}, so attention scores take memory; "
            "plan with --no-flash-attention to count it"
        )
    if cluster.device.generation in _NO_TRANSFORMER_ENGINE:
        needs = ", and sequence parallelism needs Apex" if strategy.sequence_parallel else ""
        yield f"TransformerEngine does not support {device}: Megatron's own layers are used{needs}"


def _optimizer(job: Job, strategy: Strategy) -> dict[str, Value]:
    arguments: dict[str, Value] = {"--optimizer": job.optimizer.value}
    if job.optimizer is OptimizerName.SGD:
        arguments["--sgd-momentum"] = 0.9 if job.state_bytes else 0.0
        return arguments
    moments = MEGATRON_MOMENTS[job.state_bytes]
    if moments != "fp32":
        if strategy.zero == 0:
            raise UnsupportedError(
                f"Megatron keeps {moments} optimizer states only in the distributed optimizer",
                why="the plan has zero = 0",
                fix="plan with --fix zero=1, or fp32 optimizer states",
            )
        arguments |= {
            "--use-precision-aware-optimizer": True,
            "--exp-avg-dtype": moments,
            "--exp-avg-sq-dtype": moments,
        }
    return arguments | {"--adam-beta1": Variable("ADAM_BETA1", 0.9), "--adam-beta2": Variable("ADAM_BETA2", 0.95)}


def _training() -> dict[str, Value]:
    """What a plan does not decide: defaults to try a plan with, all to be set in the environment."""
    return {
        "--train-iters": Variable("TRAIN_ITERS", 50),
        "--lr": Variable("LR", 3e-4),
        "--min-lr": Variable("MIN_LR", 3e-5),
        "--lr-decay-style": Variable("LR_DECAY_STYLE", "cosine"),
        "--lr-warmup-iters": Variable("LR_WARMUP_ITERS", 0),
        "--weight-decay": Variable("WEIGHT_DECAY", 0.1),
        "--clip-grad": Variable("CLIP_GRAD", 1.0),
        "--init-method-std": Variable("INIT_METHOD_STD", 0.02),
        "--eval-iters": Variable("EVAL_ITERS", 0),
        "--eval-interval": Variable("EVAL_INTERVAL", 1000),
        "--log-interval": Variable("LOG_INTERVAL", 1),
        "--log-throughput": True,
    }


def _environment(cluster: Cluster, strategy: Strategy) -> dict[str, str | None]:
    """``CUDA_DEVICE_MAX_CONNECTIONS``: Blackwell must only not run short of queues. Before it, FSDP needs more than one
    (arg:1166), so that gathers overlap, and tensor and context parallelism need exactly one (arg:1477), so that
    collectives start before the GEMMs they overlap."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if cluster.device.generation == _BLACKWELL:
        return {name: str(_BLACKWELL_CONNECTIONS)}
    if strategy.zero > 1:
        return {name: None}
    return {name: "1"} if strategy.tp * strategy.cp > 1 else {}
