"""The matrix multiplications and attention of one layer on one rank, from the model's widths and the strategy.

Symbols as in :mod:`.compute`: tokens are those of the rank, b * s / cp.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniap_tune.graph import LayerType
from uniap_tune.spec import Mla, Model


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a strategy changes the computation of one rank."""

    tp: int
    cp: int
    ep: int
    etp: int
    sp: int
    samples: int


@dataclass(frozen=True, slots=True)
class Gemm:
    """``count`` multiplications of (m, k) by (k, n); ``quantized``: runs in the 8- or 4-bit format of the job."""

    m: float
    n: float
    k: float
    count: float = 1.0
    quantized: bool = True


def attention_gemms(model: Model, tokens: float, tp: int) -> list[Gemm]:
    """The linear layers of attention on one rank, as (tokens, outputs, inputs)."""
    hidden = model.hidden_size
    mla = model.mla
    if mla is None:
        qkv = (model.q_width + 2 * model.kv_width) / tp
        return [Gemm(tokens, qkv, hidden), Gemm(tokens, hidden, model.q_width / tp)]
    gemms = [
        Gemm(tokens, mla.kv_lora_rank + mla.qk_rope_dim, hidden),
        *latent_gemms(model, mla, tokens, tp),
        Gemm(tokens, hidden, model.num_heads * mla.v_dim / tp),
    ]
    return gemms if mla.q_lora_rank is None else [Gemm(tokens, mla.q_lora_rank, hidden), *gemms]


def latent_gemms(model: Model, mla: Mla, tokens: float, tp: int) -> list[Gemm]:
    """Queries, keys and values of multi-latent attention from their latents (queries may come from the input)."""
    q_width = model.num_heads * (mla.qk_nope_dim + mla.qk_rope_dim) / tp
    kv_width = model.num_heads * (mla.qk_nope_dim + mla.v_dim) / tp
    return [Gemm(tokens, q_width, mla.q_lora_rank or model.hidden_size), Gemm(tokens, kv_width, mla.kv_lora_rank)]


def cross_attention_gemms(model: Model, tokens: float, read: float, tp: int) -> list[Gemm]:
    """The linear layers of cross-attention: queries of ``tokens``, keys and values of the encoder's ``read`` ones."""
    hidden = model.hidden_size
    return [
        Gemm(tokens, model.q_width / tp, hidden),
        Gemm(read, 2 * model.kv_width / tp, hidden),
        Gemm(tokens, hidden, model.q_width / tp),
    ]


def mlp_gemms(model: Model, tokens: float, tp: int, width: int) -> list[Gemm]:
    """The linear layers of a dense MLP on one rank."""
    fan = 2 if model.gated_mlp else 1
    return [Gemm(tokens, fan * width / tp, model.hidden_size), Gemm(tokens, model.hidden_size, width / tp)]


def moe_gemms(model: Model, tokens: float, shape: Shape) -> list[Gemm]:
    """Router, grouped GEMMs of the local experts (balanced routing) and shared experts on one rank."""
    moe = model.moe
    if moe is None:
        return []
    local = moe.num_experts / shape.ep
    rows = max(1.0, tokens * moe.top_k * shape.etp / shape.tp / local)
    fan = 2 if model.gated_mlp else 1
    width = moe.expert_ffn_size / shape.etp
    gemms = [
        Gemm(tokens / shape.sp, moe.num_experts, model.hidden_size, quantized=False),
        Gemm(rows, fan * width, model.hidden_size, local),
        Gemm(rows, model.hidden_size, width, local),
    ]
    if moe.shared_ffn_size:
        gemms += mlp_gemms(model, tokens, shape.tp, moe.shared_ffn_size)
    return gemms


def head_widths(model: Model) -> tuple[int, int]:
    """Widths of one query-key head and of one value head."""
    if model.mla is not None:
        return model.mla.qk_nope_dim + model.mla.qk_rope_dim, model.mla.v_dim
    return model.head_dim, model.head_dim


def fuses_softmax(longest: int, batches: int, rows: int, keys: int) -> bool:
    """Whether scaling, masking and softmax of unfused attention are one kernel, for so many (sample, head) pairs a rank
    and no more than ``longest`` keys (megatron/core/fusions/fused_softmax.py and TransformerEngine's softmax.py,
    ``is_kernel_available``)."""
    return 16 < keys <= longest and rows % 4 == 0 and keys % 4 == 0 and batches % 4 == 0


def attended(layer: LayerType, seq: int) -> float:
    """Query-key pairs of one sequence: s^2; causal s^2 / 2, or the band of a sliding window."""
    if not layer.causal:
        return float(seq * seq)
    window = min(layer.window or seq, seq)
    return window * seq - window * window / 2
