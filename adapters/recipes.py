"""Which reader reads a recipe: by its name, and for YAML by its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uniap_tune.errors import InputError
from uniap_tune.recipe import Recipe

from .argument_list import read_argument_list
from .bridge import read_bridge
from .documents import printable
from .megatron_shell import read_shell
from .megatron_yaml import is_model_config, read_model_config
from .nemo import read_nemo
from .yaml_text import read_yaml_text

_SHELL = frozenset({".sh", ".bash", ".sbatch", ".slurm", ".job", ".sub"})
_YAML = frozenset({".yaml", ".yml"})
_LISTS = frozenset({".txt", ".args"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read what a recipe leaves open.

    Attributes:
        given: values of variables of a script.
        overrides: ``key=value`` pairs or names of YAML files that override a Megatron-Bridge recipe.
        execute: run the script, with stand-ins for what it starts.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    execute: bool = False


def read_recipe(name: str, options: ReadOptions | None = None) -> Recipe:
    """The recipe in a file; ``FILE.py::FUNCTION`` names one of several Megatron-Bridge recipes.

    Raises:
        InputError: not readable as a recipe; names file and line.
    """
    try:
        return _read(name, options or ReadOptions())
    except InputError as error:  # it may quote the recipe, which may hold anything
        raise InputError(printable(error.what), why=printable(error.why), fix=printable(error.fix)) from None


def _read(name: str, options: ReadOptions) -> Recipe:
    file, _, function = name.partition("::")
    path = Path(file)
    kind = path.suffix.lower()
    if kind == ".py":
        return read_bridge(path, function, options.overrides)
    if options.overrides:
        raise InputError(f"{printable(name)}: --override is for Megatron-Bridge recipes (.py)", fix="edit the recipe")
    if kind in _SHELL or (not kind and _starts_with_shebang(path)):
        captured = None
        if options.execute:
            from .capture import capture

            captured = capture(path, options.given)
        return read_shell(path, options.given, captured)
    if options.execute:
        raise InputError(f"{printable(name)}: only scripts can be executed", fix="leave out --execute")
    if kind in _YAML:
        document = read_yaml_text(path)
        return read_model_config(document) if is_model_config(document) else read_nemo(document)
    if kind in _LISTS:
        return read_argument_list(path)
    raise InputError(
        f"{printable(name)}: not a kind of recipe that is known",
        why="its name should end in .sh, .sbatch, .yaml, .py, .txt or .args",
        fix="give a launch script, a model_config.yaml, a NeMo or Megatron-Bridge recipe, or a list of arguments",
    )


def _starts_with_shebang(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False
