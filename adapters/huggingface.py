"""Hugging Face ``config.json`` -> :class:`~uniap_tune.spec.Model`.

A source is a ``config.json``, a folder that holds one, or the name of a model whose configuration ships with the
package (``uniap_tune/data/models``). The file is read as data: nothing in it is executed or fetched, ``auto_map``
and the like are ignored. A ``model_type`` without an entry in :data:`~uniap_tune.adapters.hf_families.FAMILIES` is
an error, never a guess.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.spec import Model

from .hf_families import FAMILIES, MULTIMODAL, Family
from .hf_keys import Keys

# The longest published configurations (with per-layer lists and label maps) stay below 100 kB.
_LARGEST_FILE = 4 << 20

# What transformers' base class and most families assume.
_COMMON_DEFAULTS: Mapping[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}


class HuggingFaceReader:
    """Reads folders, JSON files and names; leaves existing files with other endings to other readers."""

    name = "huggingface config.json"

    def matches(self, source: str) -> bool:
        """Whether the source is a JSON file or no file at all."""
        path = Path(source)
        return path.suffix.lower() == ".json" or not _is_file(path)

    def read(self, source: str) -> Model:
        """The model; see :func:`read_model`."""
        return read_model(source)


def shipped_models() -> tuple[str, ...]:
    """Names of the models whose configuration ships with the package, sorted."""
    return tuple(sorted(_shipped()))


def read_model(source: str | Path) -> Model:
    """The model a configuration describes.

    Args:
        source: a ``config.json``, a folder that holds one, or a name (in any case) out of
            :func:`shipped_models` or the Hugging Face id of such a model. What exists on disk comes first.

    Raises:
        InputError: the source does not exist, is no configuration, or misses or contradicts a key.
    """
    path = Path(source)
    config = path / "config.json"
    if _is_file(config):
        return _read_file(config, default_name=path.resolve().name)
    if _is_file(path):
        stem = path.stem if path.stem != "config" else path.resolve().parent.name
        return _read_file(path, default_name=stem)
    name = _shipped_name(str(source))
    if name is not None:
        return parse_config(_load(_shipped()[name], f"{name}.json"), file=f"{name}.json", name=name)
    if _is_folder(path):
        raise InputError(f"{source}: no config.json in this folder", fix="give the folder of a Hugging Face model")
    raise _unknown(str(source))


def parse_config(values: Mapping[str, Any], *, file: str, name: str) -> Model:
    """The model of an already parsed configuration.

    Args:
        values: the JSON object.
        file: how messages name the configuration.
        name: the model's name.

    Raises:
        InputError: unknown ``model_type``, or a key is missing, malformed or contradicts another.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not (model_type in FAMILIES or model_type in MULTIMODAL):
        raise _unknown_family(file, values)
    if model_type in MULTIMODAL:
        text = Keys(file, values).nested("text_config")
        if text is None:
            raise InputError(f"{file}: text_config is missing", fix="give the complete config.json")
        # some published files name the family on the outside only
        text = {"model_type": MULTIMODAL[model_type], **text}
        return parse_config(text, file=f"{file}: text_config", name=name)
    family = FAMILIES[model_type]
    keys = Keys(file, values, {**_COMMON_DEFAULTS, **family.defaults}, family.names)
    facts = {**_common_facts(keys, family), **family.facts(keys)}
    heads, kv_heads = facts["num_heads"], facts["num_kv_heads"]
    if heads % kv_heads:
        raise InputError(
            f"{file}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})",
            fix="correct num_attention_heads or num_key_value_heads",
        )
    return Model(name=name, family=model_type, **facts)


def _common_facts(keys: Keys, family: Family) -> dict[str, Any]:
    heads = keys.size("num_attention_heads")
    sizes: dict[str, Callable[[], int]] = {
        "ffn_size": lambda: keys.size("intermediate_size"),
        "num_kv_heads": lambda: keys.optional_size("num_key_value_heads") or heads,
        "head_dim": lambda: keys.optional_size("head_dim") or _even_head_dim(keys, heads),
    }
    return {
        "num_layers": keys.layers("num_hidden_layers"),
        "hidden_size": keys.size("hidden_size"),
        "vocab_size": keys.size("vocab_size"),
        "num_heads": heads,
        "norm_epsilon": keys.number("rms_norm_eps"),
        "max_positions": keys.optional_size("max_position_embeddings"),
        "activation": keys.text("hidden_act"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "attention_dropout": keys.number("attention_dropout"),
        "hidden_dropout": keys.number("hidden_dropout"),
        **_rope(keys),
        **{name: read() for name, read in sizes.items() if name not in family.own_sizes},
    }


def _even_head_dim(keys: Keys, heads: int) -> int:
    hidden = keys.size("hidden_size")
    if hidden % heads:
        raise InputError(
            f"{keys.file}: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})",
            why="head_dim is not given, so the heads must share the hidden size evenly",
            fix="correct one of the two or add head_dim",
        )
    return hidden // heads


def _rope(keys: Keys) -> dict[str, Any]:
    """Rotary positions, in the present form (``rope_parameters``) and the earlier one (``rope_scaling``)."""
    key = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    given = keys.nested(key) or {}
    if isinstance(given.get("full_attention"), dict):  # a set for each kind of layer
        given = given["full_attention"]
    outer = {"rope_theta": keys.number("rope_theta"), "partial_rotary_factor": keys.number("partial_rotary_factor")}
    rope = Keys(f"{keys.file}: {key}", given, outer, {"rope_type": ("rope_type", "type")})
    scaling = rope.text("rope_type")
    return {
        "rope_theta": rope.number("rope_theta"),
        "rope_fraction": rope.number("partial_rotary_factor"),
        "rope_scaling": scaling if scaling not in ("", "default") else None,
        "rope_scaling_factor": rope.optional_number("factor"),
    }


def _read_file(path: Path, *, default_name: str) -> Model:
    values = _load(path, str(path))
    return parse_config(values, file=str(path), name=_own_name(values) or default_name)


def _own_name(values: Mapping[str, Any]) -> str | None:
    """``_name_or_path`` when it is a name, not a place on the disk where the file was written."""
    name = values.get("_name_or_path")
    if not isinstance(name, str) or not name or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    return name


def _load(path: Path | Traversable, shown: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"{shown}: cannot be read", why=why, fix="check the file and its permissions") from error
    if len(data) > _LARGEST_FILE:
        raise InputError(
            f"{shown}: larger than {_LARGEST_FILE >> 20} MiB, so not a configuration",
            fix="give the model's config.json, not its weights",
        )
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, bad encoding, endless digits
        raise InputError(f"{shown}: not JSON", why=str(error), fix="give the model's config.json") from error
    if not isinstance(values, dict):
        raise InputError(f"{shown}: a JSON {_json_kind(values)}, not an object", fix="give the model's config.json")
    return values


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises on names too long for the file system


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - as above


@cache
def _shipped() -> Mapping[str, Traversable]:
    folder = files("uniap_tune.data") / "models"
    return {entry.name.removesuffix(".json"): entry for entry in folder.iterdir() if entry.name.endswith(".json")}


def _shipped_name(source: str) -> str | None:
    """The shipped model called ``source``: its name, or the Hugging Face id it was published under."""
    wanted = source.lower()
    if wanted in _shipped():
        return wanted
    if wanted.count("/") != 1:
        return None
    ids = (
        name
        for name, entry in _shipped().items()
        if str(_load(entry, entry.name).get("_name_or_path", "")).lower() == wanted
    )
    return next(ids, None)


def _unknown(source: str) -> InputError:
    near = difflib.get_close_matches(source.lower(), shipped_models(), n=3, cutoff=0.5)
    known = f"did you mean {', '.join(near)}?" if near else f"shipped models: {', '.join(shipped_models())}"
    return InputError(
        f"{source}: no such file or folder, and no shipped model of that name",
        why=known,
        fix="give one of these names, or the path of a config.json or of a folder holding one",
    )


def _unknown_family(file: str, values: Mapping[str, Any]) -> InputError:
    known = f"known families: {', '.join(sorted({*FAMILIES, *MULTIMODAL}))}"
    if "model_type" not in values:
        return InputError(f"{file}: model_type is missing", why=known, fix="give the config.json of a language model")
    return InputError(
        f"{file}: model_type {values['model_type']!r} is not known",
        why=known,
        fix="use a model of a known family, or add this one to adapters/hf_families.py",
    )
