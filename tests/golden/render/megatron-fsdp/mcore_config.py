# Written by uniap-tune VERSION, inputs 0123456789abcdef.
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

transformer_config = TransformerConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    normalization="RMSNorm",
    layernorm_epsilon=1e-05,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    add_bias_linear=False,
    gated_linear_unit=True,
    bf16=True,
    init_model_with_meta_device=True,
    gradient_accumulation_fusion=False,
    activation_func=torch.nn.functional.silu,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
)

ddp_config = DistributedDataParallelConfig(
    data_parallel_sharding_strategy="optim_grads_params",
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    use_megatron_fsdp=True,
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
