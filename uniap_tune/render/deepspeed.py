"""Plan -> DeepSpeed configuration, launch script and, for pipelines, the split of the layers.

What DeepSpeed's JSON can and cannot say follows DeepSpeed 0.19.8 (runtime/config.py, runtime/zero/config.py).
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any, NoReturn

from uniap_tune.accumulation import zero_refusal
from uniap_tune.cost.runtime import gradient_bucket
from uniap_tune.errors import UnsupportedError
from uniap_tune.plan import Plan
from uniap_tune.render.shell import script
from uniap_tune.spec import Cluster, DType, Job, Model, OptimizerName, Recompute
from uniap_tune.strategy import CAPABILITIES, Strategy, Target
from uniap_tune.targets import notes

_CLIPPING = 1.0  # the norm Megatron-LM and transformers clip at by default


def deepspeed_files(plan: Plan, model: Model, cluster: Cluster, job: Job, header: str) -> dict[str, str]:
    """``ds_config.json``, ``launch.sh`` and, with a pipeline, ``pipeline_split.json``.

    Raises:
        UnsupportedError: DeepSpeed cannot run this plan; says what is in the way.
    """
    config = deepspeed_config(plan, model, job)
    recompute = _recomputes(plan)
    files = {
        "ds_config.json": _json(config),
        "launch.sh": script(
            "deepspeed/launch.sh.j2",
            header=header,
            summary=f"{model.name} on {cluster.name}",
            notes=notes(model, job, plan.target),
            cluster=cluster,
            pipeline=plan.pp > 1,
            tied=model.tied_embeddings,
            sharded=plan.strategies[0].zero == 3,
            recompute=recompute,
            tensor=plan.strategies[0].tp,
            trainer=_trainer_arguments(config, recompute),
        ),
    }
    if plan.pp > 1:
        files["pipeline_split.json"] = _json(pipeline_split(plan))
    return files


def deepspeed_config(plan: Plan, model: Model, job: Job) -> dict[str, Any]:
    """The configuration as DeepSpeed reads it.

    With tensor parallelism ``train_batch_size`` is left out: DeepSpeed compares it to micro-batch x accumulation x
    all ranks, as if tensor-parallel ranks saw different samples.
    """
    strategy = _one_grid(plan)
    interval = 1 if _recomputes(plan) else 0
    config: dict[str, Any] = {} if strategy.tp > 1 else {"train_batch_size": job.global_batch}
    config |= {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_microbatches,
        "gradient_clipping": _CLIPPING,
    }
    config |= _precision(job, strategy)
    config["zero_optimization"] = _zero(model, strategy, pipeline=plan.pp > 1)
    if strategy.zero and job.optimizer is OptimizerName.SGD:  # runtime/engine.py, "untested ZeRO Optimizer"
        config["zero_allow_untested_optimizer"] = True
    if strategy.tp > 1:
        config["tensor_parallel"] = {"autotp_size": strategy.tp}
    if plan.pp > 1:
        config["pipeline"] = {"activation_checkpoint_interval": interval, "use_reentrant": False}
    return config


def pipeline_split(plan: Plan) -> dict[str, Any]:
    """Where to cut a ``PipelineModule`` whose layers are the embedding, each block, and the head with the loss.

    ``parts`` are the bounds of the stages: stage i has the layers from ``parts[i]`` up to ``parts[i + 1]``.
    ``activation_checkpoint_interval`` counts layers between checkpoints; 0 keeps all activations.
    """
    return {
        "schema_version": 1,
        "num_stages": plan.pp,
        "parts": [0, *accumulate(len(stage.layers) for stage in plan.stages)],
        "activation_checkpoint_interval": 1 if _recomputes(plan) else 0,
        "layers": [name for stage in plan.stages for name in stage.layers],
    }


def _one_grid(plan: Plan) -> Strategy:
    strategy = plan.uniform()
    if strategy is None:
        kinds = ", ".join(sorted({s.describe() for s in plan.strategies})[:4])
        _refuse(f"it runs one parallel grid for all layers; the plan has {kinds}")
    if strategy.cp > 1 or strategy.ep > 1:
        _refuse(f"it has no context or expert parallelism for this model; the plan has {strategy.describe()}")
    if plan.pp > 1 and strategy.tp > 1:
        _refuse(f"its tensor parallelism does not work in a pipeline; the plan has tp={strategy.tp} and pp={plan.pp}")
    if plan.pp > 1 and strategy.zero > 1:
        _refuse(f"its pipelines run with ZeRO 0 or 1; the plan has zero={strategy.zero} and pp={plan.pp}")
    if plan.schedule != "1f1b":
        _refuse(f"its pipelines run 1F1B; the plan's schedule is {plan.schedule}")
    return strategy


def _recomputes(plan: Plan) -> bool:
    """Whether all blocks are recomputed in full; else none is."""
    modes = {s.recompute for stage in plan.stages for s in stage.block_strategies()}
    if not modes <= {Recompute.FULL} and not modes <= {Recompute.NONE}:
        _refuse(f"it recomputes all layers or none; the plan has {', '.join(sorted(modes))}")
    return Recompute.FULL in modes


def _refuse(why: str) -> NoReturn:
    raise UnsupportedError("this plan cannot be launched by DeepSpeed", why=why, fix="plan with --target deepspeed")


def _precision(job: Job, strategy: Strategy) -> dict[str, Any]:
    compute = job.precision.compute
    if compute is DType.FP32:
        return {}
    config: dict[str, Any] = {("fp16" if compute is DType.FP16 else "bf16"): {"enabled": True}}
    if job.precision.gradient_bytes == 4:
        if reason := zero_refusal(job, CAPABILITIES[Target.DEEPSPEED], strategy.zero):
            _refuse(reason)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero(model: Model, strategy: Strategy, *, pipeline: bool) -> dict[str, Any]:
    """Sizes are whole numbers, as DeepSpeed demands."""
    if strategy.zero == 0:
        return {"stage": 0}
    square = model.hidden_size**2
    bucket = gradient_bucket(model)
    config: dict[str, Any] = {"stage": strategy.zero, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    if not pipeline:  # a pipeline schedules its reductions itself and switches this off
        config["overlap_comm"] = True
    if strategy.zero < 3:
        return config | {"reduce_scatter": True, "allgather_partitions": True, "allgather_bucket_size": bucket}
    return config | {
        # The rules of transformers (integrations/deepspeed.py): prefetch less than the largest matrix of a layer, and
        # keep what is no matrix, norms and biases, on every rank.
        "stage3_prefetch_bucket_size": square * 9 // 10,
        "stage3_param_persistence_threshold": 10 * model.hidden_size,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def _trainer_arguments(config: dict[str, Any], recompute: bool) -> list[str]:
    """What the Trainer of transformers must be told for its arguments to agree with the configuration."""
    arguments = [
        f"--per_device_train_batch_size={config['train_micro_batch_size_per_gpu']}",
        f"--gradient_accumulation_steps={config['gradient_accumulation_steps']}",
        f"--max_grad_norm={config['gradient_clipping']}",
    ]
    arguments += [f"--{name}" for name in ("bf16", "fp16") if name in config]
    return arguments + (["--gradient_checkpointing"] if recompute else [])


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
