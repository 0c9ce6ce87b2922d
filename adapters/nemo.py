"""Training configurations of the NeMo launcher: ``trainer``, ``model``, ``model.optim``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from uniap_tune.errors import InputError
from uniap_tune.recipe import Argument, Changes, ClusterHints, Recipe
from uniap_tune.spec import Cluster

from .megatron import build_recipe
from .nemo_keys import FOR_VIRTUAL_STAGES, KEYS, SWITCHES, as_arguments, switch_text
from .source_text import SourceFile
from .yaml_text import YamlEditor, YamlText, parse_yaml_text, scalar

_COMMENT = "# Tuned by uniap-tune"
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_MOST_STEPS = 50
_SHARDED = ("distributed_fused_adam", "mcore_distributed_optim")
_PLAIN_ADAM = "fused_adam"
_PRECISIONS = {"16": "fp16", "16-mixed": "fp16", "fp16": "fp16", "bf16": "bf16", "bf16-mixed": "bf16"}

# What NeMo decides itself, or has no key for.
UNSAYABLE = frozenset({"overlap-grad-reduce", "overlap-param-gather", "cp-comm-type"})

# Arguments whose key in NeMo is not megatron-core's.
_PREFERRED = {
    "recompute-granularity": "activations_checkpoint_granularity",
    "recompute-method": "activations_checkpoint_method",
    "recompute-num-layers": "activations_checkpoint_num_layers",
    "micro-batch-size": "micro_batch_size",
}

_OPERATIONS: Mapping[str, Callable[[list[int]], int]] = {
    "multiply": math.prod,
    "add": sum,
    "sum": sum,
    "divide_floor": lambda numbers: numbers[0] // numbers[1],
    "divide_ceil": lambda numbers: -(-numbers[0] // numbers[1]),
}


@dataclass(frozen=True, slots=True)
class NemoSource:
    """The file a configuration was read from."""

    document: YamlText

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return "NeMo configuration"

    @property
    def name(self) -> str:
        """Its path."""
        return self.document.file.name

    def originals(self) -> dict[str, str]:
        """The file as it is."""
        return {self.document.file.path.name: self.document.file.text}

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:
        """The file with the changes: values in place, what must go is set to null or False."""
        editor = YamlEditor(self.document)
        for name, value in changes.values.items():
            if name == "use-distributed-optimizer":
                editor.set(("model", "optim", "name"), _SHARDED[0])
            else:
                path = self._key(name)
                editor.set(path, switch_text(path[-1], on=True).title() if value is True else scalar(str(value)))
        for name in sorted(changes.removed):
            if name == "use-distributed-optimizer":
                editor.set(("model", "optim", "name"), _PLAIN_ADAM)
            else:
                is_switch = any(name == switch for switch, _ in SWITCHES.values())
                path = self._key(name)
                editor.set(path, switch_text(path[-1], on=False).title() if is_switch else "null")
        for key, number in (("num_nodes", cluster.num_nodes), ("devices", cluster.devices_per_node)):
            entry = self.document.entries.get(("trainer", key))
            if entry is not None and entry.value.isdecimal() and int(entry.value) != number:
                editor.set(("trainer", key), str(number))
        return {self.document.file.path.name: editor.text(header, _COMMENT)}

    def _key(self, name: str) -> tuple[str, ...]:
        """The key that says an argument: the one that is there, else the usual one."""
        keys = [key for key, meant in KEYS.items() if meant == name]
        keys += [key for key, (meant, _) in SWITCHES.items() if meant == name]
        present = [key for key in keys if ("model", key) in self.document.entries]
        usual = [_PREFERRED[name]] if name in _PREFERRED else []
        choices = [*present, *usual, *keys]
        if not choices:
            raise InputError(f"{self.name}: NeMo has no key for --{name}", fix="fix the degrees in question with --fix")
        return ("model", choices[0])

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """See :class:`~uniap_tune.recipe.Source`."""
        path = self.document.file.path
        return read_nemo(parse_yaml_text(SourceFile(path, files[path.name])))


def read_nemo(document: YamlText) -> Recipe:
    """The recipe of a NeMo configuration.

    Raises:
        InputError: not one, or a value that matters is missing, unknown or wrong; names file and line.
    """
    if ("model",) not in document.mappings:
        raise InputError(
            f"{document.file.name}: neither MODEL_ARGS nor model is in it",
            fix="give a model_config.yaml of Megatron-LM or a training configuration of NeMo",
        )
    arguments: dict[str, Argument] = {}
    for path, entry in document.entries.items():
        if len(path) == 2 and path[0] == "model":
            value = _resolved(document, entry.value, path)
            for name, meaning in as_arguments(path[1], value or "unknown").items():
                reason = "" if value is not None else f"{entry.value[:60]} at {document.where(path)}"
                values = () if meaning is True else (str(meaning),)
                arguments[name] = Argument(name, values, document.where(path), reason)
    for name, where in _from_elsewhere(document):
        arguments[name] = Argument(name, (), where)
    return build_recipe(
        document.file.path,
        NemoSource(document),
        arguments,
        hints=ClusterHints(num_nodes=_number(document, "num_nodes"), devices_per_node=_number(document, "devices")),
        zero=frozenset({0, 1}),
        manages_environment=True,
        unsayable=UNSAYABLE,
        for_virtual_stages=FOR_VIRTUAL_STAGES,
        notes=() if "vocab-size" in arguments else ("the configuration names no vocabulary size: GPT-2's is taken",),
    )


def _from_elsewhere(document: YamlText) -> list[tuple[str, str]]:
    """Switches that other sections than ``model`` stand for, with their places."""
    found = []
    optimizer = document.entries.get(("model", "optim", "name"))
    if optimizer is not None and optimizer.value in _SHARDED:
        found.append(("use-distributed-optimizer", document.where(optimizer.path)))
    for path in (("trainer", "precision"), ("model", "precision")):
        entry = document.entries.get(path)
        if entry is not None and entry.value in _PRECISIONS:
            found.append((_PRECISIONS[entry.value], document.where(path)))
            break
    return found


def _number(document: YamlText, key: str) -> int | None:
    entry = document.entries.get(("trainer", key))
    return int(entry.value) if entry is not None and re.fullmatch(r"[1-9]\d{0,6}", entry.value) else None


def _resolved(document: YamlText, value: str, path: tuple[str, ...]) -> str | None:
    """A value with its interpolations followed; ``None`` if one of them cannot be."""
    for _ in range(_MOST_STEPS):
        match = _INNERMOST.search(value)
        if match is None:
            return value
        inner = _interpolated(document, match.group(1), path)
        if inner is None:
            return None
        value = value[: match.start()] + inner + value[match.end() :]
        if len(value) > 1000:
            return None
    return None


def _interpolated(document: YamlText, inner: str, path: tuple[str, ...]) -> str | None:
    operation, colon, rest = inner.partition(":")
    if colon:
        texts = [text.strip() for text in rest.split(",")]
        if operation not in _OPERATIONS or not all(re.fullmatch(r"\d{1,12}", text) for text in texts):
            return None
        numbers = [int(text) for text in texts]
        if operation.startswith("divide") and (len(numbers) != 2 or not numbers[1]):
            return None
        return str(_OPERATIONS[operation](numbers))
    dots = len(inner) - len(inner.lstrip("."))
    base = path[: len(path) - dots] if dots else ()
    entry = document.entries.get((*base, *inner[dots:].split(".")))
    return entry.value if entry is not None else None
