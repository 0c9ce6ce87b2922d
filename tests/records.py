"""Records for the tests of predict and accuracy, and where measured data may be found."""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "measured"
MEASURED = Path(os.environ.get("UNIAP_MEASURED") or _BESIDE)
NOT_MEASURED = "no measured data in $UNIAP_MEASURED nor beside the checkout"

LLAMA = {
    "name": "llama3_8b",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "hidden_act": "swiglu",
    "position": "rope",
    "tie_word_embeddings": False,
    "bias": False,
}


def record(**changes: object) -> dict[str, object]:
    """A complete record: Llama-3-8B on eight H100s."""
    complete: dict[str, object] = {
        "id": "llama",
        "model": LLAMA,
        "gpu": "H100",
        "gpu_mem_gb": 80,
        "num_gpus": 8,
        "seq_length": 8192,
        "tp": 2,
        "pp": 1,
        "vp": None,
        "cp": 1,
        "ep": 1,
        "dp": 4,
        "mbs": 1,
        "gbs": 128,
        "precision": "BF16",
        "zero": 1,
        "recompute": "none",
        "step_time_s": 12.0,
    }
    return {**complete, **changes}


MEGATRON_ARGS = {
    "num-layers": 12,
    "hidden-size": 512,
    "num-attention-heads": 8,
    "seq-length": 1024,
    "micro-batch-size": 4,
    "global-batch-size": 32,
    "tensor-model-parallel-size": 2,
    "pipeline-model-parallel-size": 2,
    "bf16": True,
    "transformer-impl": "transformer_engine",
    "attention-backend": "unfused",
    "deterministic-mode": True,
    "no-gradient-accumulation-fusion": True,
}


def megatron_record(**changes: object) -> dict[str, object]:
    """A record of Megatron arguments; ``changes`` are arguments with underscores for dashes."""
    args = {**MEGATRON_ARGS, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return {"test": "gpt/case", "hardware": "A100", "num_gpus": 8, "test_type": "regular", "args": args}
