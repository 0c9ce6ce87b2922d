# Written by uniap-tune VERSION, inputs 0123456789abcdef.
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

transformer_config = TransformerConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    normalization="RMSNorm",
    layernorm_epsilon=1e-05,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=4,
    num_layers_in_first_pipeline_stage=7,
    num_layers_in_last_pipeline_stage=7,
    recompute_granularity="full",
    recompute_method="block",
    recompute_num_layers=3,
    sequence_parallel=True,
    add_bias_linear=False,
    gated_linear_unit=True,
    bf16=True,
    activation_func=torch.nn.functional.silu,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
)

ddp_config = DistributedDataParallelConfig(
    grad_reduce_in_fp32=True,
)

optimizer_config = OptimizerConfig(
    optimizer="adam",
    adam_beta1=0.9,
    adam_beta2=0.95,
    bf16=True,
    params_dtype=torch.bfloat16,
)
