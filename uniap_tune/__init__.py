"""Automatic parallelism planning for LLM training (UniAP, arXiv 2307.16375).

>>> import uniap_tune
>>> model = uniap_tune.read_model("llama-2-7b")
>>> cluster = uniap_tune.read_cluster("1x8:a100-80gb")
>>> job = uniap_tune.Job(global_batch=128, seq_length=4096)
>>> uniap_tune.plan(model, cluster, job, target="megatron").pp
1

Names are imported on first use, so that ``import uniap_tune`` stays cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from uniap_tune.adapters.cluster import read_cluster as read_cluster
    from uniap_tune.adapters.registry import read_model as read_model
    from uniap_tune.plan import Plan as Plan
    from uniap_tune.planner import plan as plan
    from uniap_tune.render import render as render
    from uniap_tune.spec import Cluster as Cluster
    from uniap_tune.spec import Job as Job
    from uniap_tune.spec import Model as Model
    from uniap_tune.strategy import Target as Target

_HOMES = {
    "Cluster": "uniap_tune.spec",
    "Job": "uniap_tune.spec",
    "Model": "uniap_tune.spec",
    "Plan": "uniap_tune.plan",
    "Target": "uniap_tune.strategy",
    "plan": "uniap_tune.planner",
    "read_cluster": "uniap_tune.adapters.cluster",
    "read_model": "uniap_tune.adapters.registry",
    "render": "uniap_tune.render",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'uniap_tune' has no attribute {name!r}")
    return getattr(import_module(home), name)


class _Package(ModuleType):
    """Importing the submodules ``plan`` and ``render`` must not hide the functions of the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
