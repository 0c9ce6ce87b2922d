"""Runs arguments through Megatron's own code, in a process of its own: ``megatron_check.py FOLDER < cases.json``.

FOLDER holds the unpacked wheel of megatron-core 0.17 or later, which has ``megatron.training``. A case has ``argv``,
``environment``, ``world_size`` and ``generation`` (compute capability); the answer, JSON in the same order, has
``error`` or what Megatron made of the arguments. GPUs, TransformerEngine and Triton are stood in for: none of them
matters to what is checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import torch
from megatron_stand_ins import stand_in
from packaging.version import Version
from torch.testing._internal.distributed.fake_pg import FakeStore

stand_in(sys.argv[1])

import megatron.core.models.common.embeddings.rope_utils as rope_utils  # noqa: E402
import megatron.core.utils as core_utils  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.enums import LayerType  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args  # noqa: E402

core_utils._te_version = Version("2.9.0")
rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = Mock()
torch.cuda.Stream = Mock()
GPTModel.setup_embeddings_and_output_layer = Mock()  # the stages that share the embedding agree on its values

ARGUMENTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "data_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "use_megatron_fsdp",
    "data_parallel_sharding_strategy",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "accumulate_allreduce_grads_in_fp32",
    "max_position_embeddings",
    "padded_vocab_size",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "untie_embeddings_and_output_weights",
)
CONFIG = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "qk_layernorm",
    "qk_l2_norm",
    "window_size",
    "window_attn_skip_freq",
    "attention_dropout",
    "hidden_dropout",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "fp8",
    "fp8_recipe",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "mtp_num_layers",
)
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def check(case: dict[str, Any]) -> dict[str, Any]:
    """What Megatron makes of one case."""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    os.environ.update(case["environment"], WORLD_SIZE=str(case["world_size"]), RANK="0", LOCAL_RANK="0")
    major = case["generation"]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=major, minor=0)
    torch.cuda.get_device_capability = lambda *_: (major, 0)
    sys.argv = ["pretrain_gpt.py", *case["argv"]]
    args = validate_args(parse_args(), {})
    config = core_transformer_config_from_args(args)
    pp = config.pipeline_model_parallel_size
    answer = {name: getattr(args, name) for name in ARGUMENTS} | {name: getattr(config, name) for name in CONFIG}
    answer["latent"] = [getattr(config, name) for name in LATENT] if config.multi_latent_attention else None
    answer["activation"] = config.activation_func.__name__
    virtual = config.virtual_pipeline_model_parallel_size or 1
    places = [(chunk if virtual > 1 else None, stage) for chunk in range(virtual) for stage in range(pp)]
    layout = config.pipeline_model_parallel_layout
    answer["chunk_layers"] = [
        layout.layout[stage][chunk or 0].count(LayerType.decoder)
        if layout is not None
        else get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage)
        for chunk, stage in places
    ]
    answer["stage_parameters"] = {}
    for stage in case["build"]:
        with process_groups(args, stage):
            chunks = range(virtual) if virtual > 1 else [None]
            answer["stage_parameters"][stage] = sum(parameters(args, config, stage, chunk) for chunk in chunks)
    return answer


@contextlib.contextmanager
def process_groups(args: Any, stage: int) -> Iterator[None]:
    """Megatron's process groups as the first rank of a stage sees them, without any process.

    Replicas change nothing but the time it takes; only the experts' grid needs them.
    """
    world_size = args.world_size if args.num_experts else args.world_size // args.data_parallel_size
    rank = stage * world_size // args.pipeline_model_parallel_size
    torch.distributed.init_process_group("fake", store=FakeStore(), world_size=world_size, rank=rank)
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def parameters(args: Any, config: Any, stage: int, chunk: int | None) -> int:
    """Parameters of the first rank of a stage in one of its model chunks, from what Megatron builds for it."""
    config.use_cpu_initialization = True
    # what layers without TransformerEngine and Apex cannot do, none of which has parameters
    config.sequence_parallel = config.persist_layer_norm = config.gradient_accumulation_fusion = False
    config.moe_grouped_gemm = False
    config.context_parallel_size = 1
    pp = config.pipeline_model_parallel_size
    if args.num_experts:
        kernels = {"use_transformer_engine": False, "normalization": args.normalization}
        spec = get_gpt_decoder_block_spec(config, vp_stage=chunk, **kernels)
    else:
        spec = get_gpt_layer_local_spec(
            normalization=args.normalization, qk_layernorm=args.qk_layernorm, qk_l2_norm=args.qk_l2_norm
        )
    with torch.device("meta"):
        model = GPTModel(
            config,
            spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            pre_process=stage == 0 and not chunk,
            post_process=stage == pp - 1 and chunk in (None, (args.virtual_pipeline_model_parallel_size or 0) - 1),
            vp_stage=chunk,
        )
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Check all cases; what Megatron prints is thrown away."""
    answers = []
    for case in json.load(sys.stdin):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                answers.append(check(case))
        except (Exception, SystemExit) as error:
            lines = said.getvalue().splitlines()[-1:]
            answers.append({"error": f"{type(error).__name__}: {error} {' '.join(lines)}"})
    print("\n" + json.dumps(answers, default=str))  # log handlers took the old stdout; the answer is the last line


main()
