"""Which arguments of Megatron-LM a recipe is read for, and of what kind their values are.

Names are without dashes. Arguments that are not listed are kept as they are, whatever they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Whole numbers of at least one.
COUNTS = frozenset(
    {
        "context-parallel-size", "decoder-first-pipeline-num-layers",
        "decoder-last-pipeline-num-layers", "expert-model-parallel-size", "expert-tensor-parallel-size",
        "ffn-hidden-size", "global-batch-size", "hidden-size", "kv-channels", "kv-lora-rank",
        "make-vocab-size-divisible-by", "max-position-embeddings", "micro-batch-size",
        "microbatch-group-size-per-virtual-pipeline-stage", "moe-ffn-hidden-size", "moe-router-topk",
        "num-attention-heads", "num-distributed-optimizer-instances", "num-experts", "num-layers",
        "num-layers-per-virtual-pipeline-stage", "num-query-groups", "num-virtual-stages-per-pipeline-rank",
        "padded-vocab-size", "pipeline-model-parallel-size", "q-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim",
        "recompute-num-layers", "rotary-seq-len-interpolation-factor", "seq-length", "tensor-model-parallel-size",
        "v-head-dim", "vocab-size",
    }
)  # fmt: skip

# Whole numbers that may be zero.
COUNTS_FROM_ZERO = frozenset(
    {
        "cpu-offloading-num-layers", "moe-shared-expert-intermediate-size", "mtp-num-layers", "wgrad-deferral-limit",
    }
)  # fmt: skip

NUMBERS = frozenset(
    {
        "attention-dropout", "hidden-dropout", "layernorm-epsilon", "norm-epsilon", "rope-scaling-factor",
        "rotary-base", "rotary-percent", "rotary-scaling-factor",
    }
)  # fmt: skip

SWITCHES = frozenset(
    {
        "account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split",
        "accumulate-allreduce-grads-in-fp32", "add-qkv-bias", "apply-layernorm-1p", "apply-query-key-layer-scaling",
        "attention-softmax-in-fp32", "bf16", "calculate-per-token-loss",
        "cross-entropy-loss-fusion", "defer-embedding-wgrad-compute", "delay-wgrad-compute", "deterministic-mode",
        "disable-bias-linear", "distribute-saved-activations", "fp16", "fp8-param-gather", "grad-reduce-in-bf16",
        "group-query-attention", "init-model-with-meta-device", "moe-grouped-gemm", "moe-shared-expert-gate",
        "multi-latent-attention", "no-gradient-accumulation-fusion", "no-masked-softmax-fusion",
        "no-overlap-p2p-communication", "optimizer-cpu-offload", "overlap-grad-reduce",
        "overlap-moe-expert-parallel-comm", "overlap-p2p-communication-warmup-flush",
        "overlap-param-gather", "overlap-param-gather-with-optimizer-step", "qk-l2-norm", "qk-layernorm",
        "recompute-activations", "sequence-parallel", "squared-relu", "swiglu", "tp-comm-overlap",
        "untie-embeddings-and-output-weights", "use-custom-fsdp", "use-distributed-optimizer", "use-flash-attn",
        "use-megatron-fsdp", "use-precision-aware-optimizer", "use-rope-scaling", "use-rotary-position-embeddings",
        "use-torch-fsdp2",
    }
)  # fmt: skip

CHOICES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "data-parallel-sharding-strategy": frozenset({"no_shard", "optim", "optim_grads", "optim_grads_params"}),
        "exp-avg-dtype": frozenset({"fp32", "fp16", "bf16", "fp8"}),
        "exp-avg-sq-dtype": frozenset({"fp32", "fp16", "bf16", "fp8"}),
        "normalization": frozenset({"LayerNorm", "RMSNorm"}),
        "recompute-granularity": frozenset({"full", "selective"}),
        "recompute-method": frozenset({"uniform", "block"}),
        "transformer-impl": frozenset({"local", "transformer_engine", "inference_optimized"}),
    }
)

TEXTS = frozenset(
    {
        "attention-backend", "ckpt-format", "cp-comm-type", "cross-entropy-fusion-impl", "fp4-format", "fp8-format",
        "fp8-recipe", "hierarchical-context-parallel-sizes", "moe-layer-freq", "optimizer",
        "pipeline-model-parallel-layout", "position-embedding-type", "rampup-batch-size", "recompute-modules",
        "rope-type", "tokenizer-type", "window-attn-skip-freq", "window-size",
    }
)  # fmt: skip

# Whatever of these is not known, or stands in a branch that was not followed, makes a recipe unreadable.
RELEVANT = COUNTS | COUNTS_FROM_ZERO | NUMBERS | SWITCHES | frozenset(CHOICES) | TEXTS
