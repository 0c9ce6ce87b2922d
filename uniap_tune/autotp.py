"""What DeepSpeed's automatic tensor parallelism makes of a model of ``transformers``.

Found by training each family on two ranks of DeepSpeed 0.19.8 with transformers 5.24, and kept in
``tests/conformance/test_deepspeed_tensor.py``. It differs from Megatron-LM's (arXiv 1909.08053 section 3) in the
embedding and the output layer, and in that each linear layer that is cut along its outputs reduces the gradient of its
input by itself.
"""

from __future__ import annotations

from enum import StrEnum

from uniap_tune.spec import Model


class Vocabulary(StrEnum):
    """How tensor-parallel ranks share the embedding, the output layer and the loss."""

    SPLIT = "split"  # all by rows of the vocabulary
    GATHERED = "gathered"  # the output layer by rows, whose logits every rank gathers; the embedding is whole
    WHOLE = "whole"  # embedding and output layer are whole on every rank


# Families whose blocks it cuts right. It refuses gpt2 ("AutoTP not supported for model"), phi3 and models with experts
# ("unsupported partition style"), and fails in the first step of bloom and falcon.
_CUT = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "nemotron", "opt"}
)
_JOINED_PROJECTIONS = frozenset({"gpt_neox"})  # queries, keys and values are one linear layer
_TIED_AND_SPLIT = frozenset({"llama", "qwen2", "qwen3", "gemma3_text"})


def tensor_refusal(model: Model, tp: int) -> str:
    """Why it cannot cut a model into ``tp`` equal parts; empty: it can."""
    if tp == 1:
        return ""
    if model.moe is not None or model.family not in _CUT:
        return f"DeepSpeed's AutoTP does not cut models of the family {model.family}"
    if model.num_kv_heads % tp:
        return f"AutoTP cuts attention by the {model.num_kv_heads} key-value heads, which tp {tp} does not divide"
    return ""


def column_layers(model: Model) -> int:
    """Linear layers of a block that are cut along their outputs."""
    attention = 1 if model.family in _JOINED_PROJECTIONS else 3
    return attention + (2 if model.gated_mlp else 1)


def vocabulary(model: Model) -> Vocabulary:
    """How the ranks share what has the vocabulary's size."""
    if not model.tied_embeddings:
        return Vocabulary.GATHERED
    return Vocabulary.SPLIT if model.family in _TIED_AND_SPLIT else Vocabulary.WHOLE
