from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import ConfigContainer, DistributedDataParallelConfig, TrainingConfig


def pretrain_config(
    tensor_model_parallel_size: int = 4,
    pipeline_model_parallel_size: int = 2,
    global_batch_size: int = 256,
    micro_batch_size: int = 2,
    seq_length: int = 2048,
) -> ConfigContainer:
    model_cfg = GPTModelProvider(
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=4 * 5120,
        num_attention_heads=40,
        vocab_size=50304,
        seq_length=seq_length,
        position_embedding_type="learned_absolute",
        max_position_embeddings=seq_length,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        sequence_parallel=tensor_model_parallel_size > 1,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return ConfigContainer(
        model=model_cfg,
        train=TrainingConfig(train_iters=1000, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        mixed_precision="bf16_mixed",
    )
