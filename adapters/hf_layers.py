"""Which layers of a Hugging Face model differ from the others: local and global attention, dense and expert MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.spec import Moe

from .hf_keys import Keys


def attention_windows(keys: Keys, kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """``window`` and ``window_global_every`` from the kind of attention of each layer.

    Args:
        keys: the configuration; its ``layer_types`` replaces ``kinds`` where it is given.
        kinds: for each layer ``"full_attention"`` or a local kind.
        window: the width of local attention.

    Raises:
        InputError: the global layers are not every N-th one.
    """
    listed = keys.sequence("layer_types")
    if listed is not None:
        kinds = listed
    num_layers = keys.layers("num_hidden_layers")
    if len(kinds) != num_layers:
        keys.refuse("layer_types", f"a list of num_hidden_layers ({num_layers}) entries")
    whole = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if window is None or len(whole) == num_layers:
        return {}
    every = whole[0] + 1 if whole else 0
    if whole != (list(range(every - 1, num_layers, every)) if every else []):
        raise InputError(
            f"{keys.file}: layers with global attention must be every N-th one",
            why=f"they are layers {_shorten(whole)} (from 0)",
            fix="correct layer_types (or the keys it follows from) or remove the sliding window",
        )
    return {"window": window, "window_global_every": every}


def expert_layers(keys: Keys, key: str, layers: Sequence[Any], moe: Moe) -> Moe | None:
    """``moe`` with the layers it applies to, or ``None`` when no layer has experts.

    Args:
        keys: the configuration.
        key: the key that decides, for messages.
        layers: indices of the layers with experts.
        moe: the experts.

    Raises:
        InputError: the layers are neither all from some layer on nor every N-th one.
    """
    num_layers = keys.layers("num_hidden_layers")
    if any(isinstance(index, bool) or not isinstance(index, int) for index in layers):
        keys.refuse(key, "a list of layer indices")
    if not layers:
        return None
    first = layers[0]
    frequency = layers[1] - first if len(layers) > 1 else num_layers - first
    if frequency > 0 and list(layers) == list(range(first, num_layers, frequency)) and first >= 0:
        dense = first // frequency * frequency
        return replace(moe, first_dense_layers=dense, layer_frequency=frequency, layer_offset=first % frequency)
    raise InputError(
        f"{keys.file}: {key} puts experts on layers {_shorten(layers)} (from 0)",
        why="known patterns are all layers from some layer on, and every N-th layer",
        fix=f"correct {key}",
    )


def _shorten(indices: Sequence[Any]) -> str:
    shown = ", ".join(str(index) for index in indices[:8])
    return f"{shown}, ..." if len(indices) > 8 else shown
