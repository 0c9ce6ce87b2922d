"""Megatron-Bridge recipes: python functions that build a configuration, read from their syntax tree, never imported.

Followed are assignments of plain values (``cfg.model.tensor_model_parallel_size = 4``), keyword arguments, defaults of
parameters, and functions of the same file. The answer is a list of overrides in Hydra's form; the recipe stays.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uniap_tune.errors import InputError
from uniap_tune.megatron.mcore import DDP_FIELDS, DDP_SWITCHES
from uniap_tune.recipe import Argument, Changes, Recipe
from uniap_tune.render.megatron_model import model_arguments
from uniap_tune.render.shell import Variable, number
from uniap_tune.spec import Cluster, Job, Model

from .bridge_ast import Setting, read_settings
from .documents import printable
from .huggingface import read_model
from .megatron import build_recipe
from .nemo_keys import FOR_VIRTUAL_STAGES, KEYS, SWITCHES, as_arguments, switch_text
from .source_text import SourceFile, is_there, read_source
from .yaml_text import parse_yaml_text, scalar

# Megatron-Bridge trains in bf16 unless a recipe says otherwise, with the distributed optimizer and its overlaps
# (recipes/utils: DistributedDataParallelConfig of every pre-training recipe).
_TRAIN = {"micro_batch_size": "micro-batch-size", "global_batch_size": "global-batch-size"}
# Its CommOverlapConfig, which is None unless the recipe makes one, has the last word (training/comm_overlap.py).
_OVERLAPS, _TENSOR_OVERLAP = "comm_overlap", "tp_comm_overlap"
_SEQUENCE = (("dataset", "sequence_length"), ("dataset", "seq_length"), ("model", "seq_length"))
_PROVIDER = re.compile(r"(Llama|Qwen|Mixtral|Mistral|DeepSeek|GPT|Nemotron)(\d*)\w*?Provider(\w+)")
_FP8 = {
    "fp8_current_scaling": "tensorwise",
    "fp8_delayed_scaling": "delayed",
    "mxfp8": "mxfp8",
    "fp8_subchannel": "blockwise",
}


@dataclass(frozen=True, slots=True)
class BridgeSource:
    """A recipe's file and function, and the overrides that were given with it."""

    file: SourceFile
    function: str
    overrides: tuple[tuple[tuple[str, ...], str], ...]

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return "Megatron-Bridge recipe"

    @property
    def name(self) -> str:
        """Its file and function."""
        return f"{self.file.name}::{self.function}" if self.function else self.file.name

    def originals(self) -> dict[str, str]:
        """Nothing: the answer is new files."""
        return {}

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:  # noqa: ARG002
        """The overrides as YAML, and as words for the command line."""
        overrides = dict(self.overrides)
        for name, value in changes.values.items():
            path = _path(name, self)
            overrides[path] = switch_text(path[-1], on=True) if value is True else str(value)
        for name in sorted(changes.removed):
            path = _path(name, self)
            is_switch = name in DDP_SWITCHES or any(name == switch for switch, _ in SWITCHES.values())
            overrides[path] = switch_text(path[-1], on=False) if is_switch else "null"
        stem = self.function or self.file.path.stem
        return {
            f"{stem}.overrides.yaml": f"# Tuned by uniap-tune {header}\n{_nested(overrides)}",
            f"{stem}.overrides.txt": "".join(
                shlex.quote(f"{'.'.join(path)}={_hydra(value)}") + "\n" for path, value in overrides.items()
            ),
        }

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """See :class:`~uniap_tune.recipe.Source`."""
        stem = self.function or self.file.path.stem
        name = f"{stem}.overrides.yaml"
        return _read(self.file, self.function, _from_yaml(SourceFile(Path(name), files[name])))


def read_bridge(path: Path, function: str = "", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a function in a python file.

    Args:
        path: the file.
        function: its name; may be empty if there is one only.
        overrides: ``model.key=value`` or names of YAML files, later ones win.

    Raises:
        InputError: not python, no such function, or a value that matters is missing or wrong; names file and line.
    """
    pairs: list[tuple[tuple[str, ...], str]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals and not text.endswith((".yaml", ".yml")):
            pairs.append((tuple(key.lstrip("+~").split(".")), _unquoted(value)))
        else:
            pairs += _from_yaml(read_source(Path(text)))
    return _read(read_source(path), function, tuple(pairs))


def _read(file: SourceFile, function: str, overrides: tuple[tuple[tuple[str, ...], str], ...]) -> Recipe:
    settings, base = read_settings(file, function)
    for path, value in overrides:
        settings[path] = Setting(value, f"override {'.'.join(path)}")
    arguments: dict[str, Argument] = {}
    model = _base_model(base)
    if model is not None:
        job = Job(global_batch=1, seq_length=model.max_positions or 1)
        for flag, given in model_arguments(model, job, tp=1).items():
            name = flag.removeprefix("--")
            said = () if given is True or isinstance(given, Variable) else (number(given),)
            arguments[name] = Argument(name, said, base[1])
        del arguments["seq-length"], arguments["max-position-embeddings"], arguments["padded-vocab-size"]
        arguments["vocab-size"] = Argument("vocab-size", (str(model.vocab_size),), base[1])
    for path, setting in settings.items():
        meanings = _unknown_meaning(path) if setting.unknown else _meaning(path, setting.value)
        for name, meaning in meanings.items():
            if meaning is None:
                arguments.pop(name, None)
            else:
                values = () if meaning is True else (str(meaning),)
                arguments[name] = Argument(name, values, setting.where, setting.unknown)
    if base[0] and "num-layers" not in arguments:
        raise InputError(
            f"{base[1]}: the model {printable(base[0])[:60]} is not one of those that ship with uniap-tune",
            fix="give its sizes as overrides: model.num_layers=…, model.hidden_size=…",
        )
    notes = () if "vocab-size" in arguments else ("the recipe names no vocabulary size: GPT-2's is taken",)
    return build_recipe(
        file.path,
        BridgeSource(file, function, overrides),
        arguments,
        manages_environment=True,
        for_virtual_stages=FOR_VIRTUAL_STAGES,
        notes=notes,
    )


def _meaning(path: tuple[str, ...], value: str) -> dict[str, str | bool | None]:
    """The arguments a setting stands for; ``None`` takes one back."""
    lowered = value.lower()
    if path[:1] == ("train",) and path[-1] in _TRAIN:
        return {_TRAIN[path[-1]]: value}
    if path in _SEQUENCE:
        return {"seq-length": value}
    if path[0] in ("ddp", "optimizer"):
        return _sharding(path[-1], value)
    if path[0] == "mixed_precision":
        return _precision(lowered)
    if path == ("checkpoint", "ckpt_format"):
        return {"ckpt-format": value}
    if path in ((_OVERLAPS, _TENSOR_OVERLAP), ("model", _TENSOR_OVERLAP)):
        return {"tp-comm-overlap": True if lowered == "true" else None}
    if path[0] != "model" or len(path) != 2:
        return {}
    meaning: dict[str, str | bool | None] = dict(as_arguments(path[1], value))
    if meaning:
        return meaning
    if path[1] in SWITCHES:
        return {SWITCHES[path[1]][0]: None}
    if path[1] == "num_query_groups":
        return {"num-query-groups": None, "group-query-attention": None}
    return {KEYS[path[1]]: None} if path[1] in KEYS and value.lower() in ("none", "null") else {}


def _unknown_meaning(path: tuple[str, ...]) -> dict[str, str | bool | None]:
    """The argument whose value is not known."""
    key = path[-1]
    if path[0] == "train" and key in _TRAIN:
        return {_TRAIN[key]: "unknown"}
    if path in _SEQUENCE:
        return {"seq-length": "unknown"}
    if len(path) != 2 or path[0] != "model":
        return {}
    name = KEYS.get(key) or (SWITCHES[key][0] if key in SWITCHES else "")
    return {name: "unknown"} if name else {}


def _sharding(key: str, value: str) -> dict[str, str | bool | None]:
    for name, (field, means) in DDP_SWITCHES.items():
        if field == key and key != "grad_reduce_in_fp32":
            return {name: True if (value.lower() == "true") is means else None}
    if key == "grad_reduce_in_fp32":
        wide = value.lower() == "true"
        return {
            "grad-reduce-in-bf16": None if wide else True,
            "accumulate-allreduce-grads-in-fp32": True if wide else None,
        }
    for name, field in DDP_FIELDS.items():
        if field == key:
            return {name: value}
    return {}


def _precision(name: str) -> dict[str, str | bool | None]:
    """``bf16_mixed``, ``bf16_with_fp8_current_scaling_mixed`` and the like."""
    meaning: dict[str, str | bool | None] = {"fp16": True} if name.startswith(("fp16", "16")) else {"bf16": True}
    for word, recipe in _FP8.items():
        if word in name:
            meaning |= {"fp8-format": "hybrid", "fp8-recipe": recipe}
    return meaning


def _path(name: str, source: BridgeSource) -> tuple[str, ...]:
    """The key that says an argument."""
    for key, meant in _TRAIN.items():
        if meant == name:
            return ("train", key)
    if name in DDP_SWITCHES:
        return ("ddp", DDP_SWITCHES[name][0])
    if name in DDP_FIELDS:
        return ("ddp", DDP_FIELDS[name])
    if name == "ckpt-format":
        return ("checkpoint", "ckpt_format")
    if name == "tp-comm-overlap":
        settings, _ = read_settings(source.file, source.function)
        said = [*settings, *(path for path, _ in source.overrides)]
        return (_OVERLAPS if any(path[0] == _OVERLAPS for path in said) else "model", _TENSOR_OVERLAP)
    keys = [key for key, meant in KEYS.items() if meant == name]
    keys += [key for key, (meant, _) in SWITCHES.items() if meant == name]
    if not keys:
        raise InputError(f"{source.name}: Megatron-Bridge has no key for --{name}", fix="fix it with --fix")
    return ("model", keys[0])


def _base_model(base: tuple[str, str]) -> Model | None:
    """The model of a Hugging Face id or of a provider's class, if it ships with the package."""
    name = base[0]
    provider = _PROVIDER.fullmatch(name)
    if provider:
        family, version, size = provider.group(1).lower(), provider.group(2), provider.group(3).lower()
        dotted = version if len(version) < 2 else f"{version[0]}.{version[1:]}"
        joint = "-" if family == "llama" and version else ""
        name = f"{family}{joint}{dotted}-{size}"
    if not name or is_there(Path(name)):  # an id, never a file of this name
        return None
    try:
        return read_model(name)
    except InputError:
        return None


def _from_yaml(file: SourceFile) -> tuple[tuple[tuple[str, ...], str], ...]:
    return tuple((path, entry.value) for path, entry in parse_yaml_text(file).entries.items())


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _hydra(value: str) -> str:
    """A value of an override; Hydra's grammar wants quotes around anything unusual."""
    return value if re.fullmatch(r"[\w.+-]+", value) else "'" + value.replace("'", "\\'") + "'"


def _nested(overrides: Mapping[tuple[str, ...], str]) -> str:
    """Overrides as nested YAML, sections in the order of their first key."""
    lines: list[str] = []
    for section in dict.fromkeys(path[:-1] for path in overrides):
        lines += [f"{'  ' * depth}{key}:" for depth, key in enumerate(section)]
        indent = "  " * len(section)
        for path, value in overrides.items():
            if path[:-1] == section:
                plain = value in ("true", "false", "null")
                lines.append(f"{indent}{path[-1]}: {value if plain else scalar(value)}")
    return "\n".join(lines) + "\n" if lines else "{}\n"
