"""The model of a measurement record: HF-like keys, or the short keys of benchmark tables."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from uniap_tune.errors import InputError
from uniap_tune.spec import Mla, Model, Moe, Norm, Position

from .megatron_kinds import bert_model, t5_model
from .record_fields import Fields, SkippedRecordError, count, flag, mapping, required, text

_GATED = ("swiglu", "silu", "geglu", "gated")
_SIZE = re.compile(r"[-_]?(?:h\d+.*|\d+(?:x\d+)?[_.]?\d*[bmt]\b.*)$", re.IGNORECASE)
_LARGEST_LAYERS = 10_000
_MANY_EXPERTS = 256  # of DeepSeek-V3
_FEW_LAYERS = 8
_LARGEST_WIDTH = 10**7
_GPT2_VOCABULARY = 51200  # 50257 rows, padded for tensor parallelism over 8 (arXiv 1909.08053 section 5.1)


@dataclass(frozen=True, slots=True)
class RecordModel:
    """A model, its sequence length and its encoder's (if it has one besides a decoder), and what had to be assumed."""

    model: Model
    seq_length: int
    encoder_seq_length: int | None
    assumptions: tuple[str, ...]


def read_record_model(record: Fields, *, dropout: float) -> RecordModel:
    """The record's ``model`` object.

    Args:
        record: the whole record.
        dropout: dropout of a GPT model where the record does not say.

    Raises:
        SkippedRecordError: no model.
        InputError: a field is not what it must be.
    """
    fields = mapping(record, "model")
    if fields is None:
        raise SkippedRecordError("record has no model", fix="add a model object with hidden_size, num_hidden_layers, …")
    assumptions: list[str] = []
    name = text(fields, "name") or "model"
    hidden = _bounded(fields, _LARGEST_WIDTH, "hidden_size", "hidden")
    heads = _bounded(fields, _LARGEST_WIDTH, "num_attention_heads", "heads")
    ffn = count(fields, "intermediate_size", "ffn", "ffn_hidden_size") or 4 * hidden
    gated = _is_gated(fields, hidden, ffn, assumptions)
    gpt = not gated and "rope" not in text(fields, "position")
    mla = _latent(fields, name, assumptions)
    seq = required({**fields, **record}, "seq_length", "seq", "sequence_length")
    layers = _bounded(fields, _LARGEST_LAYERS, "layers_run", "num_hidden_layers", "layers", "decoder_layers")
    tied = flag(fields, "tie_word_embeddings")
    bias = flag(fields, "bias")
    model = Model(
        name=name,
        family=family_of(name),
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=heads if mla else count(fields, "num_key_value_heads", "kv_heads") or heads,
        head_dim=_head_dim(fields, hidden, heads),
        vocab_size=_vocabulary(fields, assumptions),
        norm=Norm.LAYERNORM if gpt else Norm.RMSNORM,
        norm_bias=gpt,
        position=Position.LEARNED if gpt else Position.ROPE,
        position_rows=seq if gpt else 0,
        gated_mlp=gated,
        activation="silu" if gated else "gelu",
        qkv_bias=gpt if bias is None else bias,
        attention_out_bias=gpt if bias is None else bias,
        mlp_bias=gpt if bias is None else bias,
        tied_embeddings=gpt if tied is None else tied,
        attention_dropout=dropout if gpt else 0.0,
        hidden_dropout=dropout if gpt else 0.0,
        moe=_experts(fields, layers, mla, assumptions),
        mla=mla,
        mtp_layers=_extra_predictions(record),
    )
    kind = (text(fields, "model_type") or name).lower()
    if kind.startswith("bert"):
        return RecordModel(bert_model(model, {}), seq, None, tuple(assumptions))
    if kind.startswith("t5"):
        encoder_seq = count({**fields, **record}, "encoder_seq_length") or seq
        return RecordModel(_encoder_decoder(model, fields), seq, encoder_seq, tuple(assumptions))
    return RecordModel(model, seq, None, tuple(assumptions))


def _encoder_decoder(model: Model, fields: Fields) -> Model:
    """T5: as many layers in encoder and decoder unless the record says otherwise, and biases by relative position."""
    stated = "encoder_layers", "decoder_layers"
    encoder, decoder = (_bounded(fields, _LARGEST_LAYERS, key) if key in fields else model.num_layers for key in stated)
    model = replace(model, num_layers=decoder, position=Position.NONE, position_rows=0)
    return t5_model(model, {"position-embedding-type": "relative"}, encoder)


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    stated = count(fields, "head_dim", "kv_channels")
    if stated is None and hidden % heads:
        raise InputError(f"record's hidden size {hidden} is not a multiple of its {heads} heads", fix="add head_dim")
    return stated or hidden // heads


def family_of(name: str) -> str:
    """A model's name without its size: ``llama3_70b`` -> ``llama3``."""
    return _SIZE.sub("", name.lower()).strip("-_ ") or name.lower()


def _bounded(fields: Fields, largest: int, *keys: str) -> int:
    value = required(fields, *keys)
    if value > largest:
        raise InputError(f"record's {' or '.join(keys)} is {value}, which no model has", fix=f"correct {keys[0]}")
    return value


def _is_gated(fields: Fields, hidden: int, ffn: int, assumptions: list[str]) -> bool:
    activation = text(fields, "hidden_act", "act", "activation").lower()
    if activation:
        return any(word in activation for word in _GATED)
    gated = ffn != 4 * hidden
    assumptions.append(f"MLP taken as {'gated' if gated else 'not gated'}, from its width")
    return gated


def _vocabulary(fields: Fields, assumptions: list[str]) -> int:
    vocabulary = count(fields, "vocab_size", "vocab")
    if vocabulary is None:
        assumptions.append(f"vocabulary taken as {_GPT2_VOCABULARY}")
        return _GPT2_VOCABULARY
    if vocabulary > 10**8:
        raise InputError(f"record key 'vocab_size' is {vocabulary}, which no model has", fix="correct vocab_size")
    return vocabulary


def _latent(fields: Fields, name: str, assumptions: list[str]) -> Mla | None:
    """Multi-head latent attention, with the head sizes of DeepSeek-V2 and V3 where the record leaves them out."""
    rank = count(fields, "kv_lora_rank")
    if rank is None and not name.lower().startswith("deepseek"):
        return None
    if rank is None or count(fields, "qk_nope_head_dim") is None:
        assumptions.append("latent attention with the head sizes of DeepSeek-V3 (128 + 64, values 128)")
    return Mla(
        q_lora_rank=count(fields, "q_lora_rank") or (None if rank else 1536),
        kv_lora_rank=rank or 512,
        qk_nope_dim=count(fields, "qk_nope_head_dim") or 128,
        qk_rope_dim=count(fields, "qk_rope_head_dim") or 64,
        v_dim=count(fields, "v_head_dim") or 128,
    )


def _experts(fields: Fields, layers: int, mla: Mla | None, assumptions: list[str]) -> Moe | None:
    """Routed and shared experts, with those of DeepSeek's models where a record of one leaves them out."""
    experts = count(fields, "num_experts", "experts", "n_routed_experts")
    if experts is None or experts == 1:
        return None
    width = required(fields, "moe_intermediate_size", "moe_ffn", "expert_ffn", "intermediate_size", "ffn")
    shared = count(fields, "shared_ffn", "moe_shared_expert_intermediate_size", least=0)
    dense = count(fields, "first_k_dense_replace", least=0)
    if mla and shared is None:
        # DeepSeek-V2 (arXiv 2405.04434 section 3.1.2) has two shared experts of 160, V3 one of 256
        several = 2 if experts < _MANY_EXPERTS else 1
        shared = several * width
        assumptions.append(f"{several} shared expert{'s' if several > 1 else ''} as wide as a routed one")
    if mla and dense is None:
        # V2 one, V3 three of 61 (arXiv 2412.19437 section 4.2); jobs that run a few layers of it keep one
        dense = 3 if experts >= _MANY_EXPERTS and layers > _FEW_LAYERS else 1
        assumptions.append(f"{dense} dense layer{'s' if dense > 1 else ''} before those with experts")
    top_k = required(fields, "num_experts_per_tok", "topk", "top_k")
    if top_k > experts:
        raise InputError(f"record routes to {top_k} of {experts} experts", fix="correct num_experts_per_tok")
    return Moe(
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=width,
        shared_ffn_size=shared or 0,
        first_dense_layers=dense or 0,
    )


def _extra_predictions(record: Fields) -> int:
    """Multi-token-prediction modules: the ``m`` symbols of a pipeline layout."""
    settings = mapping(record, "settings") or {}
    return text(settings, "pp_layout").count("m")
