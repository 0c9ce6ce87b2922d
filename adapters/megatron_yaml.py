"""Functional-test configurations of Megatron-LM: ``MODEL_ARGS: {--flag: value}`` and ``ENV_VARS``.

``true`` is a switch, an empty value leaves the argument out; ``megatron_args.yaml`` of a rendered plan is one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uniap_tune.recipe import Argument, Changes, Recipe
from uniap_tune.spec import Cluster

from .megatron import build_recipe
from .source_text import SourceFile
from .yaml_text import YamlEditor, YamlText, parse_yaml_text, scalar

_ARGUMENTS, _ENVIRONMENT = "MODEL_ARGS", "ENV_VARS"
_COMMENT = "# Tuned by uniap-tune"


@dataclass(frozen=True, slots=True)
class ModelConfigSource:
    """The file a configuration was read from."""

    document: YamlText

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return "Megatron-LM model_config.yaml"

    @property
    def name(self) -> str:
        """Its path."""
        return self.document.file.name

    def originals(self) -> dict[str, str]:
        """The file as it is."""
        return {self.document.file.path.name: self.document.file.text}

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:  # noqa: ARG002
        """The file with the changes; see :class:`~uniap_tune.recipe.Source`."""
        editor = YamlEditor(self.document)
        for name, value in changes.values.items():
            editor.set((_ARGUMENTS, f"--{name}"), "true" if value is True else scalar(str(value)))
        for name in sorted(changes.removed):
            editor.remove((_ARGUMENTS, f"--{name}"))
        for name, setting in changes.environment.items():
            if setting is not None:
                editor.set((_ENVIRONMENT, name), scalar(setting))
            elif (_ENVIRONMENT, name) in self.document.entries:
                editor.remove((_ENVIRONMENT, name))
        return {self.document.file.path.name: editor.text(header, _COMMENT)}

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """See :class:`~uniap_tune.recipe.Source`."""
        path = self.document.file.path
        return read_model_config(parse_yaml_text(SourceFile(path, files[path.name])))


def is_model_config(document: YamlText) -> bool:
    """Whether a YAML document is in this format."""
    return (_ARGUMENTS,) in document.mappings


def read_model_config(document: YamlText) -> Recipe:
    """The recipe of a functional-test configuration.

    Raises:
        InputError: an argument that matters is missing, unknown or wrong; names file and line.
    """
    arguments: dict[str, Argument] = {}
    environment: dict[str, str] = {}
    for path, entry in document.entries.items():
        if path[0] == _ENVIRONMENT and len(path) == 2:
            environment[path[1]] = entry.value
        elif path[0] == _ARGUMENTS and len(path) == 2 and path[1].startswith("--"):
            name, value = path[1][2:], entry.value
            if value.lower() in ("", "false", "null", "~") and not entry.is_text:
                continue
            values = () if value == "true" else (value,)
            reason = f"{value} at {document.where(path)}" if "${" in value else ""
            arguments[name] = Argument(name, values, document.where(path), reason)
    return build_recipe(document.file.path, ModelConfigSource(document), arguments, environment=environment)
