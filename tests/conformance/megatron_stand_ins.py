"""Imports Megatron's own code without what it wants installed: ``stand_in(FOLDER)``, before anything of ``megatron``.

FOLDER holds a checkout of Megatron-LM or the unpacked wheel of megatron-core 0.17 or later, which both have
``megatron.training``. Triton and the like are stood in for: they do not matter to parsing and validating arguments.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import typing
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# PyTorch decides whether Triton is there before the stand-in is.
import torch
import torch._dynamo
import torch._inductor.select_algorithm
import torch.utils.flop_counter  # noqa: F401
import typing_extensions


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are not installed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__version__ = "3.0.0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in(folder: str) -> None:
    """Make ``megatron`` of the folder importable."""
    sys.path.insert(0, folder)
    sys.meta_path.append(StandIns(("triton", "omegaconf", "six")))
    if not hasattr(typing, "override"):  # Python 3.11
        typing.override = typing_extensions.override
