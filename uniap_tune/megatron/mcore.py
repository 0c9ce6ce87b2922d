"""Megatron arguments as keyword arguments of megatron-core's configuration classes, and back.

``TransformerConfig`` (megatron/core/transformer/transformer_config.py, with its base ``ModelParallelConfig``),
``DistributedDataParallelConfig`` and ``OptimizerConfig``. Names of arguments are without dashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Value = str | int | float | bool | None

# Argument -> field of TransformerConfig, where the value is the same.
MODEL_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "num-layers": "num_layers",
        "hidden-size": "hidden_size",
        "ffn-hidden-size": "ffn_hidden_size",
        "num-attention-heads": "num_attention_heads",
        "num-query-groups": "num_query_groups",
        "kv-channels": "kv_channels",
        "normalization": "normalization",
        "norm-epsilon": "layernorm_epsilon",
        "attention-dropout": "attention_dropout",
        "hidden-dropout": "hidden_dropout",
        "num-experts": "num_moe_experts",
        "moe-router-topk": "moe_router_topk",
        "moe-ffn-hidden-size": "moe_ffn_hidden_size",
        "moe-token-dispatcher-type": "moe_token_dispatcher_type",
        "moe-shared-expert-intermediate-size": "moe_shared_expert_intermediate_size",
        "moe-layer-freq": "moe_layer_freq",
        "mtp-num-layers": "mtp_num_layers",
        "q-lora-rank": "q_lora_rank",
        "kv-lora-rank": "kv_lora_rank",
        "qk-head-dim": "qk_head_dim",
        "qk-pos-emb-head-dim": "qk_pos_emb_head_dim",
        "v-head-dim": "v_head_dim",
        "window-attn-skip-freq": "window_attn_skip_freq",
        "tensor-model-parallel-size": "tensor_model_parallel_size",
        "pipeline-model-parallel-size": "pipeline_model_parallel_size",
        "pipeline-model-parallel-layout": "pipeline_model_parallel_layout",
        "decoder-first-pipeline-num-layers": "num_layers_in_first_pipeline_stage",
        "decoder-last-pipeline-num-layers": "num_layers_in_last_pipeline_stage",
        "context-parallel-size": "context_parallel_size",
        "cp-comm-type": "cp_comm_type",
        "expert-model-parallel-size": "expert_model_parallel_size",
        "expert-tensor-parallel-size": "expert_tensor_parallel_size",
        "microbatch-group-size-per-virtual-pipeline-stage": "microbatch_group_size_per_vp_stage",
        "num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
        "recompute-granularity": "recompute_granularity",
        "recompute-method": "recompute_method",
        "recompute-num-layers": "recompute_num_layers",
        "cpu-offloading-num-layers": "cpu_offloading_num_layers",
        "fp8-format": "fp8",
        "fp8-recipe": "fp8_recipe",
        "fp4-format": "fp4",
        "fp4-recipe": "fp4_recipe",
    }
)

# Switch -> field of TransformerConfig and its value.
MODEL_SWITCHES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "sequence-parallel": ("sequence_parallel", True),
        "apply-layernorm-1p": ("layernorm_zero_centered_gamma", True),
        "disable-bias-linear": ("add_bias_linear", False),
        "add-qkv-bias": ("add_qkv_bias", True),
        "swiglu": ("gated_linear_unit", True),
        "qk-layernorm": ("qk_layernorm", True),
        "qk-l2-norm": ("qk_l2_norm", True),
        "multi-latent-attention": ("multi_latent_attention", True),
        "moe-grouped-gemm": ("moe_grouped_gemm", True),
        "moe-shared-expert-gate": ("moe_shared_expert_gate", True),
        "bf16": ("bf16", True),
        "fp16": ("fp16", True),
        "init-model-with-meta-device": ("init_model_with_meta_device", True),
        "tp-comm-overlap": ("tp_comm_overlap", True),
        "overlap-moe-expert-parallel-comm": ("overlap_moe_expert_parallel_comm", True),
        "account-for-embedding-in-pipeline-split": ("account_for_embedding_in_pipeline_split", True),
        "account-for-loss-in-pipeline-split": ("account_for_loss_in_pipeline_split", True),
        "no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    }
)

DDP_SWITCHES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "use-distributed-optimizer": ("use_distributed_optimizer", True),
        "overlap-grad-reduce": ("overlap_grad_reduce", True),
        "overlap-param-gather": ("overlap_param_gather", True),
        "use-megatron-fsdp": ("use_megatron_fsdp", True),
        "accumulate-allreduce-grads-in-fp32": ("grad_reduce_in_fp32", True),
        "grad-reduce-in-bf16": ("grad_reduce_in_fp32", False),
    }
)
DDP_FIELDS: Mapping[str, str] = MappingProxyType({"data-parallel-sharding-strategy": "data_parallel_sharding_strategy"})

_OPTIMIZER_FIELDS = {"optimizer": "optimizer", "adam-beta1": "adam_beta1", "adam-beta2": "adam_beta2"}
_OPTIMIZER_SWITCHES = ("use-distributed-optimizer", "use-precision-aware-optimizer", "bf16", "fp16")
_DTYPES = {"exp-avg-dtype": "exp_avg_dtype", "exp-avg-sq-dtype": "exp_avg_sq_dtype"}
_TORCH = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16", "fp8": "torch.uint8"}

Section = dict[str, Any]


class Expression(str):
    """Python source, to be written without quotes."""

    __slots__ = ()


def mcore_sections(arguments: Mapping[str, Any], *, interleaved: bool = False) -> dict[str, Section]:
    """Keyword arguments by class, of a rendered launch's arguments (names without dashes).

    ``interleaved``: the stages are virtual. Then sends must not be batched, as Megatron-LM's arguments have it: with
    batched sends two stages that send to each other both ways take one message for the other.
    """
    dtype = next((name for name in ("bf16", "fp16") if name in arguments), "fp32")
    model = _fields(arguments, MODEL_FIELDS) | _switches(arguments, MODEL_SWITCHES)
    if interleaved:
        model |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if "window-size" in arguments:
        left, right = str(arguments["window-size"]).split(",")
        model["window_size"] = [int(left), int(right)]
    frequency = model.get("moe_layer_freq")
    if frequency is not None:
        model["moe_layer_freq"] = _layer_list(str(frequency))
    model["activation_func"] = Expression("torch.nn.functional." + ("silu" if "swiglu" in arguments else "gelu"))
    if "squared-relu" in arguments:
        model["activation_func"] = Expression("squared_relu")
    model["params_dtype"] = model["pipeline_dtype"] = Expression(_TORCH[dtype])
    ddp = _fields(arguments, DDP_FIELDS) | _switches(arguments, DDP_SWITCHES)
    if dtype == "bf16":
        ddp.setdefault("grad_reduce_in_fp32", True)  # Megatron-LM's own rule for bf16
    optimizer = _fields(arguments, _OPTIMIZER_FIELDS)
    optimizer |= {name.replace("-", "_"): True for name in _OPTIMIZER_SWITCHES if name in arguments}
    optimizer |= {key: Expression(_TORCH[str(arguments[name])]) for name, key in _DTYPES.items() if name in arguments}
    optimizer["params_dtype"] = Expression(_TORCH[dtype])
    kind = "MLATransformerConfig" if "multi-latent-attention" in arguments else "TransformerConfig"
    return {kind: model, "DistributedDataParallelConfig": ddp, "OptimizerConfig": optimizer}


def _fields(arguments: Mapping[str, Any], table: Mapping[str, str]) -> Section:
    return {field: arguments[name] for name, field in table.items() if name in arguments}


def _switches(arguments: Mapping[str, Any], table: Mapping[str, tuple[str, bool]]) -> Section:
    return {field: value for name, (field, value) in table.items() if name in arguments}


def _layer_list(text: str) -> list[int] | int:
    """``[0]*3+[1]*58`` as a list."""
    if text.isdecimal():
        return int(text)
    pattern: list[int] = []
    for term in text.split("+"):
        unit, _, times = term.partition("*")
        pattern += [int(unit.strip("[]"))] * int(times or 1)
    return pattern


def python_snippet(sections: Mapping[str, Section], header: str) -> str:
    """The keyword arguments as Python that builds the three objects."""
    kind = next(iter(sections))
    names = {"DistributedDataParallelConfig": "ddp_config", "OptimizerConfig": "optimizer_config"}
    is_squared = sections[kind]["activation_func"] == "squared_relu"
    lines = [
        f"# {header}",
        "import torch",
        "from megatron.core.activations import squared_relu" if is_squared else "",
        "from megatron.core.distributed import DistributedDataParallelConfig",
        "from megatron.core.optimizer import OptimizerConfig",
        f"from megatron.core.transformer import {kind}",
    ]
    lines = [line for line in lines if line]
    for name, section in sections.items():
        lines += ["", f"{names.get(name, 'transformer_config')} = {name}("]
        lines += [f"    {key}={_python(value)}," for key, value in section.items()]
        lines.append(")")
    return "\n".join(lines) + "\n"


def _python(value: object) -> str:
    if isinstance(value, Expression):
        return str(value)
    return f'"{value}"' if isinstance(value, str) else repr(value)


def plain_sections(sections: Mapping[str, Section]) -> dict[str, Section]:
    """The keyword arguments as YAML has them: Python source as text."""
    return {
        name: {key: str(value) if isinstance(value, Expression) else value for key, value in section.items()}
        for name, section in sections.items()
    }
