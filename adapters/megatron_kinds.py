"""Megatron-LM's models besides GPT: BERT (``pretrain_bert.py``) and T5 (``pretrain_t5.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from uniap_tune.spec import Model

from .record_fields import Fields, SkippedRecordError, count, flag, text

# Layers of an encoder, and of a decoder, by hidden size: T5 (arXiv 1910.10683 section 3.7) and T5 1.1.
_T5_LAYERS: Mapping[int, int] = MappingProxyType({512: 6, 768: 12, 1024: 24, 2048: 24, 4096: 24})
# examples/t5/train_t5_220m_distributed.sh
_T5_SEQUENCES = (512, 128)
_BUCKETS = 32  # --relative-attention-num-buckets
_BERT_VOCABULARY = 28996  # bert-large-cased-vocab.txt, which Megatron-LM's tests read


def bert_arguments(args: Fields, assumptions: list[str]) -> Fields:
    """BERT's arguments with its vocabulary where they leave it out."""
    if count(args, "vocab-size", "padded-vocab-size") or text(args, "tokenizer-type"):
        return args
    assumptions.append(f"BERT's cased vocabulary, {_BERT_VOCABULARY} rows")
    return {**args, "vocab-size": _BERT_VOCABULARY}


def bert_model(model: Model, args: Fields) -> Model:
    """The same sizes as BERT: attention to both sides, a transform before the output projection, and the pooler with
    its binary head and token types unless ``--bert-no-binary-head`` says otherwise (megatron/core/models/bert)."""
    binary = not flag(args, "bert-no-binary-head")
    return replace(
        model,
        name=model.name.replace("gpt", "bert"),
        family="bert",
        causal=False,
        token_types=2 if binary else 0,
        head_transform=True,
        pooled_head=binary,
        head_bias=True,
    )


def t5_arguments(args: Fields, assumptions: list[str]) -> tuple[Fields, int, int]:
    """T5's arguments as GPT's would be for its decoder, layers of its encoder, and its encoder's sequence length.

    Raises:
        SkippedRecordError: neither layers nor a published size.
    """
    encoder = count(args, "encoder-num-layers", "num-layers")
    if encoder is None:
        encoder = _T5_LAYERS.get(count(args, "hidden-size") or 0)
        if encoder is None:
            raise SkippedRecordError("record has no layers", fix="add encoder-num-layers and decoder-num-layers")
        assumptions.append(f"{encoder} layers in encoder and decoder each, as T5 of this width has")
    decoder = count(args, "decoder-num-layers") or encoder
    long = count(args, "encoder-seq-length", "seq-length")
    short = count(args, "decoder-seq-length")
    if long is None or short is None:
        long, short = long or _T5_SEQUENCES[0], short or _T5_SEQUENCES[1]
        assumptions.append(f"sequences of {long} and {short} tokens, as in Megatron-LM's example of T5")
    rows = count(args, "max-position-embeddings") or long
    changed = {"num-layers": decoder, "seq-length": short, "max-position-embeddings": rows}
    return {**args, **changed}, encoder, long


def t5_model(model: Model, args: Fields, encoder_layers: int) -> Model:
    """The same sizes as T5, with biases by relative position where ``--position-embedding-type relative`` says so."""
    relative = text(args, "position-embedding-type") == "relative"
    buckets = count(args, "relative-attention-num-buckets") or _BUCKETS
    return replace(
        model,
        name=model.name.replace("gpt", "t5"),
        family="t5",
        encoder_layers=encoder_layers,
        relative_buckets=buckets if relative else 0,
        head_bias=model.tied_embeddings,
    )
