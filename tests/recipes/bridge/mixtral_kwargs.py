from megatron.bridge.recipes.mixtral.common import MixtralCommonKwargs, _mixtral_common
from megatron.bridge.training.config import ConfigContainer
from typing_extensions import Unpack


def mixtral_8x7b_pretrain_config(**user_kwargs: Unpack[MixtralCommonKwargs]) -> ConfigContainer:
    """Mixtral 8x7B with experts over eight devices."""
    recommended: MixtralCommonKwargs = {
        "hf_path": "mistralai/Mixtral-8x7B-v0.1",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
        "global_batch_size": 256,
        "micro_batch_size": 1,
        "seq_length": 4096,
        "mixed_precision": "bf16_mixed",
    }
    combined = {**recommended, **user_kwargs}
    return _mixtral_common(**combined)
