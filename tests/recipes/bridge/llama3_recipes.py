"""Two pre-training recipes of Llama 3."""

from megatron.bridge import AutoBridge
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer

SEQ_LENGTH = 8192


def llama3_8b_pretrain_config() -> ConfigContainer:
    """Llama 3 8B on two nodes."""
    cfg = _pretrain_common()

    # Model
    cfg.model = AutoBridge.from_hf_pretrained("meta-llama/Meta-Llama-3-8B", load_weights=False).to_megatron_provider(
        load_weights=False
    )
    cfg.model.seq_length = SEQ_LENGTH
    cfg.dataset.sequence_length = SEQ_LENGTH

    # Parallelism
    cfg.model.tensor_model_parallel_size = 1
    cfg.model.pipeline_model_parallel_size = 1
    cfg.model.virtual_pipeline_model_parallel_size = None
    cfg.model.context_parallel_size = 2
    cfg.model.sequence_parallel = False

    # Memory
    cfg.model.recompute_granularity = None
    cfg.model.cross_entropy_loss_fusion = True

    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = 512
    cfg.mixed_precision = "bf16_mixed"
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    return cfg


def llama3_70b_pretrain_config() -> ConfigContainer:
    """Llama 3 70B."""
    cfg = llama3_8b_pretrain_config()
    cfg.model = AutoBridge.from_hf_pretrained("meta-llama/Meta-Llama-3-70B").to_megatron_provider()
    cfg.model.seq_length = SEQ_LENGTH
    cfg.model.tensor_model_parallel_size = 4
    cfg.model.pipeline_model_parallel_size = 4
    cfg.model.virtual_pipeline_model_parallel_size = 5
    cfg.model.context_parallel_size = 2
    cfg.model.sequence_parallel = True
    return cfg
