"""A model's architecture as arguments of Megatron-LM's ``pretrain_gpt.py``.

What has no argument is refused by :mod:`uniap_tune.targets` before a plan is made.
"""

from __future__ import annotations

from itertools import groupby

from uniap_tune.graph import block_type
from uniap_tune.render.shell import Value
from uniap_tune.spec import Job, Mla, Model, Moe, Norm, Position, QkNorm
from uniap_tune.targets import LLAMA3_FACTOR, MEGATRON_ACTIVATIONS

# Megatron's default: the embedding table is padded to a multiple of this times tp (--make-vocab-size-divisible-by).
_VOCAB_MULTIPLE = 128


def model_arguments(model: Model, job: Job, tp: int) -> dict[str, Value]:
    """All arguments that say what is trained."""
    arguments: dict[str, Value] = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_size,
        "--num-attention-heads": model.num_heads,
        "--seq-length": job.seq_length,
        "--max-position-embeddings": _positions(model, job),
        # The table's rows are given, not derived from a tokenizer, so that they are those the plan counted.
        "--padded-vocab-size": padded_vocabulary(model.vocab_size, tp),
        "--attention-dropout": model.attention_dropout,
        "--hidden-dropout": model.hidden_dropout,
    }
    if not model.tied_embeddings:
        arguments["--untie-embeddings-and-output-weights"] = True
    arguments |= _norms(model) | _biases(model) | _attention(model, job) | _position_arguments(model)
    activation = MEGATRON_ACTIVATIONS[model.gated_mlp, model.activation]
    if activation:
        arguments[activation] = True
    if model.moe is not None:
        arguments |= _experts(model, model.moe)
    if model.mtp_layers:
        arguments["--mtp-num-layers"] = model.mtp_layers
    return arguments


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding table over all tensor-parallel ranks."""
    step = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // step) * step


def _positions(model: Model, job: Job) -> int:
    """Rows of a learned table; elsewhere only a limit that must not lie below the sequence length."""
    if model.position is Position.LEARNED:
        return model.position_rows
    return max(job.seq_length, model.max_positions or 0)


def _norms(model: Model) -> dict[str, Value]:
    rms = model.norm in (Norm.RMSNORM, Norm.RMSNORM_1P)
    arguments: dict[str, Value] = {
        "--normalization": "RMSNorm" if rms else "LayerNorm",
        "--norm-epsilon": model.norm_epsilon,
    }
    if model.norm in (Norm.LAYERNORM_1P, Norm.RMSNORM_1P):
        arguments["--apply-layernorm-1p"] = True
    return arguments


def _biases(model: Model) -> dict[str, Value]:
    if model.mlp_bias:
        return {}
    arguments: dict[str, Value] = {"--disable-bias-linear": True}
    if model.qkv_bias:
        arguments["--add-qkv-bias"] = True
    return arguments


def _attention(model: Model, job: Job) -> dict[str, Value]:
    arguments: dict[str, Value] = {}
    if model.mla is not None:
        return _latent_attention(model, model.mla)
    if model.num_kv_heads != model.num_heads:
        arguments |= {"--group-query-attention": True, "--num-query-groups": model.num_kv_heads}
    if model.q_width != model.hidden_size:
        arguments["--kv-channels"] = model.head_dim
    if model.qk_norm is QkNorm.PER_HEAD:
        arguments["--qk-layernorm"] = True
    elif model.qk_norm is QkNorm.L2:
        arguments["--qk-l2-norm"] = True
    if model.window is not None and model.window < job.seq_length:
        # A token sees itself and the window - 1 tokens before it.
        arguments["--window-size"] = f"{model.window - 1},0"
        if model.window_global_every:
            arguments["--window-attn-skip-freq"] = model.window_global_every
    return arguments


def _latent_attention(model: Model, mla: Mla) -> dict[str, Value]:
    arguments: dict[str, Value] = {
        "--multi-latent-attention": True,
        "--kv-lora-rank": mla.kv_lora_rank,
        "--qk-head-dim": mla.qk_nope_dim,
        "--qk-pos-emb-head-dim": mla.qk_rope_dim,
        "--v-head-dim": mla.v_dim,
        "--qk-layernorm": True,  # the norms of the latent vectors
    }
    if mla.q_lora_rank is not None:
        arguments["--q-lora-rank"] = mla.q_lora_rank
    if model.rope_scaling == "yarn":
        arguments |= {"--rope-type": "yarn", "--rotary-scaling-factor": model.rope_scaling_factor or 1.0}
    else:
        # Megatron fuses YaRN alone here (transformer_config.py, "apply_rope_fusion for MLA")
        arguments |= {"--rope-type": "rope", "--no-rope-fusion": True}
    return arguments


def _position_arguments(model: Model) -> dict[str, Value]:
    if model.position is Position.LEARNED:
        return {"--position-embedding-type": "learned_absolute"}
    if model.position is Position.NONE:
        return {"--position-embedding-type": "none"}
    arguments: dict[str, Value] = {"--position-embedding-type": "rope", "--rotary-base": int(model.rope_theta)}
    if model.rope_fraction != 1:
        arguments["--rotary-percent"] = model.rope_fraction
    if model.rope_scaling == "llama3":
        arguments |= {"--use-rope-scaling": True, "--rope-scaling-factor": model.rope_scaling_factor or LLAMA3_FACTOR}
    elif model.rope_scaling == "linear":
        arguments["--rotary-seq-len-interpolation-factor"] = int(model.rope_scaling_factor or 1)
    return arguments


def _experts(model: Model, moe: Moe) -> dict[str, Value]:
    arguments: dict[str, Value] = {
        "--num-experts": moe.num_experts,
        "--moe-router-topk": moe.top_k,
        "--moe-ffn-hidden-size": moe.expert_ffn_size,
        "--moe-grouped-gemm": True,
        "--moe-token-dispatcher-type": "alltoall",
    }
    if moe.shared_ffn_size:
        arguments["--moe-shared-expert-intermediate-size"] = moe.shared_ffn_size
    if moe.shared_expert_gate:
        arguments["--moe-shared-expert-gate"] = True
    pattern = [int(block_type(model, index).moe) for index in range(model.num_layers)]
    if 0 in pattern:
        arguments["--moe-layer-freq"] = "+".join(f"[{kind}]*{len(list(run))}" for kind, run in groupby(pattern))
    return arguments
