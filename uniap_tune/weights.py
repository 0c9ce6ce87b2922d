"""The parameters of each layer: their shapes, their number, and how tensor parallelism cuts them.

The list is the model's own, tensor by tensor, so that its sum equals the real parameter count exactly; the cut is
Megatron-LM's (arXiv 1909.08053 section 3: column-parallel then row-parallel matrices), which DeepSpeed's AutoTP
follows in blocks (:mod:`~uniap_tune.autotp` says where it does not). Everything here is pure arithmetic on
:class:`~uniap_tune.spec.Model`.

A head that is tied to the embedding, and a multi-token-prediction block that reads the embedding, list that matrix
too, marked ``shared``: it is one parameter of the model, yet a second copy in memory where the head sits on
another pipeline stage than the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from uniap_tune.graph import LayerKind, LayerType, block_type, build_graph
from uniap_tune.spec import Mla, Model, Moe, QkNorm


class Split(StrEnum):
    """What tensor (or expert) parallelism does to a weight."""

    REPLICATED = "replicated"  # whole on every rank: norms, learned positions, routers, biases of row-parallel layers
    COLUMN = "column"  # cut along the output dimension
    ROW = "row"  # cut along the input dimension
    VOCAB = "vocab"  # cut along the vocabulary, padded if asked
    KV = "kv"  # as column; beyond num_kv_heads ranks Megatron cuts through heads and gathers the outputs
    EXPERT = "expert"  # cut along the experts by ep, each expert by etp
    EXPERT_REPLICATED = "expert_replicated"  # cut along the experts by ep only: biases of their row-parallel layer


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor: ``shape`` is (outputs, inputs), (outputs,), or (experts, outputs[, inputs]).

    ``shared`` marks a tensor that is the embedding's own, listed again where another layer uses it.
    """

    name: str
    shape: tuple[int, ...]
    split: Split = Split.REPLICATED
    shared: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weights(model: Model, layer_type: LayerType) -> tuple[Weight, ...]:
    """Every parameter tensor of a layer of this type."""
    if layer_type.kind is LayerKind.EMBEDDING:
        return tuple(_embedding(model))
    if layer_type.kind is LayerKind.HEAD:
        return tuple(_head(model))
    return tuple(_block(model, moe=layer_type.moe, cross=layer_type.cross))


def layer_parameters(model: Model, layer_type: LayerType) -> int:
    """Parameters of one layer of this type, without those it shares with the embedding."""
    return sum(weight.size for weight in weights(model, layer_type) if not weight.shared)


def parameter_count(model: Model) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    return sum(layer_parameters(model, layer.type) for layer in build_graph(model).layers)


def rank_parameters(
    model: Model, layer_type: LayerType, tp: int, *, etp: int = 1, ep: int = 1, padded_vocab: int | None = None
) -> int:
    """Parameters of one layer on one tensor-parallel rank, shared copies included.

    Args:
        model: what is trained.
        layer_type: which of its layers.
        tp: tensor-parallel ranks.
        etp: tensor-parallel ranks of an expert.
        ep: expert-parallel ranks.
        padded_vocab: rows of the embedding over all ranks (Megatron pads to a multiple of 128 * tp);
            ``None``: the vocabulary itself.

    Returns:
        The largest count over the ranks: where tp does not divide a dimension the cut is rounded up.
    """
    rows = padded_vocab or model.vocab_size
    return sum(_rank_size(weight, tp, etp, ep, rows) for weight in weights(model, layer_type))


def rank_tensors(
    model: Model,
    layer_type: LayerType,
    tp: int,
    *,
    etp: int = 1,
    ep: int = 1,
    padded_vocab: int | None = None,
    shared: bool = True,
) -> tuple[int, ...]:
    """Elements of each tensor that Megatron makes of a layer on one rank, as :func:`rank_parameters` counts them: with
    queries, keys and values as one matrix, gate and up as one, and every local expert's on their own. ``shared``: with
    those that are the embedding's own."""
    rows = padded_vocab or model.vocab_size
    sizes: list[int] = []
    joined: dict[str, int] = {}  # name of a joined tensor -> where it is in sizes
    for weight in weights(model, layer_type):
        if weight.shared and not shared:
            continue
        size = _rank_size(weight, tp, etp, ep, rows)
        if weight.split in (Split.EXPERT, Split.EXPERT_REPLICATED):
            local = _ceil(weight.shape[0], ep)
            sizes += [size // local] * local
            continue
        name = _joined_name(weight.name)
        if name in joined:
            sizes[joined[name]] += size
        else:
            joined[name] = len(sizes)
            sizes.append(size)
    return tuple(sizes)


def _joined_name(name: str) -> str:
    """Megatron's tensor that a weight is part of: linear_qkv, linear_kv of cross-attention, linear_fc1."""
    parts = (
        ("attention.k", "attention.v") if name.startswith("cross.") else ("attention.q", "attention.k", "attention.v")
    )
    kind = ".bias" if name.endswith(".bias") else ""
    stem = name.removesuffix(".bias")
    if stem.endswith(parts):
        return f"{stem[:-1]}qkv{kind}"
    return f"{stem.removesuffix('gate').removesuffix('up')}fc1{kind}" if stem.endswith((".gate", ".up")) else name


def rank_expert_parameters(model: Model, layer_type: LayerType, *, etp: int = 1, ep: int = 1) -> int:
    """The part of :func:`rank_parameters` that belongs to routed experts (they have their own data-parallel group)."""
    experts = (w for w in weights(model, layer_type) if w.split in (Split.EXPERT, Split.EXPERT_REPLICATED))
    return sum(_rank_size(weight, 1, etp, ep, model.vocab_size) for weight in experts)


def rank_linear_parameters(model: Model, layer_type: LayerType, tp: int, *, etp: int = 1, ep: int = 1) -> int:
    """The part of :func:`rank_parameters` in matrices that run in the 8- or 4-bit format of the job: linear layers of
    blocks, not routers, embeddings and the output projection."""
    experts = (Split.EXPERT, Split.EXPERT_REPLICATED)
    matrices = (
        weight
        for weight in weights(model, layer_type)
        if weight.split is not Split.VOCAB
        and not weight.name.startswith(("embedding.", "head."))
        and not weight.name.endswith(("moe.router", "moe.shared_gate"))
        and len(weight.shape) > (2 if weight.split in experts else 1)
    )
    return sum(_rank_size(weight, tp, etp, ep, model.vocab_size) for weight in matrices)


def rank_shared_parameters(model: Model, tp: int, *, padded_vocab: int | None = None) -> int:
    """The part of the head's :func:`rank_parameters` that is the embedding's own matrix.

    A stage that holds both the embedding and the head has it once: subtract this there.
    """
    rows = padded_vocab or model.vocab_size
    shared = (weight for weight in weights(model, LayerType(kind=LayerKind.HEAD)) if weight.shared)
    return sum(_rank_size(weight, tp, 1, 1, rows) for weight in shared)


def _rank_size(weight: Weight, tp: int, etp: int, ep: int, vocab_rows: int) -> int:
    shape = weight.shape
    match weight.split:
        case Split.REPLICATED:
            return weight.size
        case Split.COLUMN | Split.KV:
            return math.prod((_ceil(shape[0], tp), *shape[1:]))
        case Split.ROW:
            return shape[0] * _ceil(shape[1], tp)
        case Split.VOCAB:
            return math.prod((_ceil(vocab_rows, tp), *shape[1:]))
        case Split.EXPERT:
            return _ceil(shape[0], ep) * _ceil(math.prod(shape[1:]), etp)
        case Split.EXPERT_REPLICATED:
            return _ceil(shape[0], ep) * math.prod(shape[1:])


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)


def _embedding(model: Model) -> Iterator[Weight]:
    width = model.embedding_size or model.hidden_size
    yield Weight("embedding.word", (model.vocab_size, width), Split.VOCAB)
    if width != model.hidden_size:
        yield Weight("embedding.project_in", (model.hidden_size, width))
    if model.position_rows:
        yield Weight("embedding.position", (model.position_rows, model.hidden_size))
    if model.token_types:
        yield Weight("embedding.token_type", (model.token_types, model.hidden_size))
    if model.embedding_norm:
        yield from _norm(model, "embedding.norm", model.hidden_size)
    if model.relative_buckets:
        stacks = 2 if model.encoder_layers else 1
        yield Weight("embedding.relative", (stacks * model.relative_buckets, model.num_heads))


def _head(model: Model) -> Iterator[Weight]:
    width = model.embedding_size or model.hidden_size
    for index in range(model.mtp_layers):
        yield from _mtp(model, f"mtp.{index}")
    if model.final_norm:
        yield from _norm(model, "final_norm", model.hidden_size)
        if model.encoder_layers:
            yield from _norm(model, "encoder.final_norm", model.hidden_size)
    yield from _around_output(model)
    if width != model.hidden_size:
        yield Weight("head.project_out", (width, model.hidden_size))
    if model.mtp_layers and not model.tied_embeddings:
        yield Weight("mtp.embedding", (model.vocab_size, width), Split.VOCAB, shared=True)
    yield Weight("head.output", (model.vocab_size, width), Split.VOCAB, shared=model.tied_embeddings)
    if model.head_bias:
        yield Weight("head.output.bias", (model.vocab_size,), Split.VOCAB)


def _around_output(model: Model) -> Iterator[Weight]:
    """What BERT has besides: the transform before its output projection, the pooler and its classifier, all whole on
    every rank (megatron/core/models/bert)."""
    hidden = model.hidden_size
    if model.head_transform:
        yield from _linear("head.transform", hidden, hidden, bias=True)
        yield from _norm(model, "head.norm", hidden)
    if model.pooled_head:
        yield from _linear("head.pooler", hidden, hidden, bias=True)
        yield from _linear("head.classifier", 2, hidden, bias=True)


def _mtp(model: Model, name: str) -> Iterator[Weight]:
    """One multi-token-prediction module (arXiv 2412.19437 section 2.2); embedding and head are the model's own."""
    hidden = model.hidden_size
    yield from _norm(model, f"{name}.embedding_norm", hidden)
    yield from _norm(model, f"{name}.hidden_norm", hidden)
    yield Weight(f"{name}.projection", (hidden, 2 * hidden), Split.COLUMN)
    last = block_type(model, model.num_layers - 1)
    yield from (replace(weight, name=f"{name}.{weight.name}") for weight in _block(model, moe=last.moe))
    yield from _norm(model, f"{name}.final_norm", hidden)


def _block(model: Model, *, moe: bool, cross: bool = False) -> Iterator[Weight]:
    for index in range(model.norms_per_layer):
        yield from _norm(model, f"norm.{index}", model.hidden_size)
    if model.mla is not None:
        yield from _latent_attention(model, model.mla)
    else:
        yield from _attention(model)
    if cross:
        yield from _norm(model, "cross.norm", model.hidden_size)
        yield from (replace(weight, name=f"cross.{weight.name}") for weight in _attention(model))
    if moe and model.moe is not None:
        yield from _moe(model, model.moe)
    else:
        yield from _mlp(model, "mlp", model.ffn_size, bias=model.mlp_bias)


def _norm(model: Model, name: str, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,))
    if model.norm_bias:
        yield Weight(f"{name}.bias", (width,))


def _linear(
    name: str, outputs: int, inputs: int, split: Split = Split.REPLICATED, *, bias: bool = False
) -> Iterator[Weight]:
    yield Weight(name, (outputs, inputs), split)
    if bias:
        yield Weight(f"{name}.bias", (outputs,), Split.REPLICATED if split is Split.ROW else split)


def _attention(model: Model) -> Iterator[Weight]:
    hidden, bias = model.hidden_size, model.qkv_bias
    yield from _linear("attention.q", model.q_width, hidden, Split.COLUMN, bias=bias)
    yield from _linear("attention.k", model.kv_width, hidden, Split.KV, bias=bias)
    yield from _linear("attention.v", model.kv_width, hidden, Split.KV, bias=bias)
    if model.qk_norm is QkNorm.PER_HEAD:
        yield Weight("attention.q_norm", (model.head_dim,))
        yield Weight("attention.k_norm", (model.head_dim,))
    elif model.qk_norm is QkNorm.FULL:
        yield Weight("attention.q_norm", (model.q_width,), Split.COLUMN)
        yield Weight("attention.k_norm", (model.kv_width,), Split.KV)
    yield from _linear("attention.out", hidden, model.q_width, Split.ROW, bias=model.attention_out_bias)


def _latent_attention(model: Model, mla: Mla) -> Iterator[Weight]:
    """Multi-head latent attention (arXiv 2405.04434 section 2.1): the down projections are whole on every rank."""
    hidden, bias = model.hidden_size, model.qkv_bias
    q_width = model.num_heads * (mla.qk_nope_dim + mla.qk_rope_dim)
    if mla.q_lora_rank is None:
        yield Weight("attention.q", (q_width, hidden), Split.COLUMN)
    else:
        yield from _linear("attention.q_down", mla.q_lora_rank, hidden, bias=bias)
        yield Weight("attention.q_norm", (mla.q_lora_rank,))
        yield Weight("attention.q_up", (q_width, mla.q_lora_rank), Split.COLUMN)
    yield from _linear("attention.kv_down", mla.kv_lora_rank + mla.qk_rope_dim, hidden, bias=bias)
    yield Weight("attention.kv_norm", (mla.kv_lora_rank,))
    kv_width = model.num_heads * (mla.qk_nope_dim + mla.v_dim)
    yield Weight("attention.kv_up", (kv_width, mla.kv_lora_rank), Split.COLUMN)
    yield from _linear("attention.out", hidden, model.num_heads * mla.v_dim, Split.ROW, bias=model.attention_out_bias)


def _mlp(model: Model, name: str, width: int, *, bias: bool) -> Iterator[Weight]:
    if model.gated_mlp:
        yield from _linear(f"{name}.gate", width, model.hidden_size, Split.COLUMN, bias=bias)
    yield from _linear(f"{name}.up", width, model.hidden_size, Split.COLUMN, bias=bias)
    yield from _linear(f"{name}.down", model.hidden_size, width, Split.ROW, bias=bias)


def _moe(model: Model, moe: Moe) -> Iterator[Weight]:
    yield from _linear("moe.router", moe.num_experts, model.hidden_size, bias=moe.router_bias)
    for weight in _mlp(model, "moe.experts", moe.expert_ffn_size, bias=model.mlp_bias):
        split = Split.EXPERT_REPLICATED if weight.split is Split.REPLICATED else Split.EXPERT
        yield Weight(weight.name, (moe.num_experts, *weight.shape), split)
    if moe.shared_ffn_size:
        yield from _mlp(model, "moe.shared", moe.shared_ffn_size, bias=model.mlp_bias)
        if moe.shared_expert_gate:
            yield Weight("moe.shared_gate", (1, model.hidden_size))
