# Written by uniap-tune VERSION, inputs 0123456789abcdef.
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

transformer_config = TransformerConfig(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    normalization="RMSNorm",
    layernorm_epsilon=1e-05,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    tensor_model_parallel_size=8,
    pipeline_model_parallel_size=4,
    pipeline_model_parallel_layout="Et*18|t*20|t*21|t*21L",
    sequence_parallel=True,
    add_bias_linear=False,
    gated_linear_unit=True,
    bf16=True,
    activation_func=torch.nn.functional.silu,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
)

ddp_config = DistributedDataParallelConfig(
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    grad_reduce_in_fp32=True,
)

optimizer_config = OptimizerConfig(
    optimizer="adam",
    adam_beta1=0.9,
    adam_beta2=0.95,
    use_distributed_optimizer=True,
    bf16=True,
    params_dtype=torch.bfloat16,
)
