"""Who may import whom: imports point downward only, and heavy packages have one owner each.

The layers are one table here; ``docs/architecture.md`` explains them. A new module is given its place in it.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"uniap_tune": "uniap_tune", "adapters": "uniap_tune.adapters", "templates": "uniap_tune.templates"}

# From the bottom up. A name stands for the module, or the package with all that is in it, without "uniap_tune.".
# Entries of one line are independent of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "units", "data", "schedule", "deadline", "templates", "prose"),
    ("megatron",),
    ("spec", "files"),
    ("hardware", "graph", "strategy", "autotp"),
    ("accumulation",),
    ("weights", "targets", "space"),
    ("legality",),
    ("cost",),
    ("problem",),
    ("pareto",),
    ("intervals",),
    ("bounds",),
    ("labels",),
    ("columns",),
    ("chain", "interleave"),
    ("milp",),
    ("formulate", "solvers"),
    ("quick", "ties", "feasibility", "lean"),
    ("plan",),
    ("simulate", "predict"),
    ("replay",),
    ("search", "accuracy", "breakdown"),
    ("assemble", "relax", "parallel"),
    ("render", "recipe"),
    ("adapters",),
    ("planner",),
    ("frontier", "tuning"),
    ("explain",),
    ("deepspeed",),
    ("doctor",),
    ("report",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Packages from outside, and the only entries of LAYERS that may import them; None: everybody.
OUTSIDE: dict[str, set[str] | None] = {
    "numpy": None,
    "psutil": None,
    "pulp": {"milp"},
    "highspy": {"milp"},
    "rich": {"report"},
    "jinja2": {"render"},
    "yaml": {"adapters", "render"},
    "deepspeed": {"deepspeed", "commands"},
    "torch": {"deepspeed"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def entry(module: str) -> str:
    """The entry of LAYERS to which a module belongs."""
    return "__init__" if module == "uniap_tune" else module.split(".")[1]


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that ``from … import`` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    is_package = modules()[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


def imports(module: str) -> Iterator[str]:
    """What a module imports, anywhere in it: modules of ours, or names of others."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                is_version = inner == "uniap_tune.__version__"  # a fact about the package, not an import of its API
                if not is_version:
                    yield inner if inner in modules() else source


def test_every_module_has_a_layer() -> None:
    unlisted = sorted(name for name in modules() if entry(name) not in RANK)
    assert not unlisted, f"give these a place in LAYERS: {unlisted}"


@pytest.mark.parametrize("module", modules())
def test_imports_point_downward(module: str) -> None:
    own = entry(module)
    for imported in imports(module):
        if imported.split(".")[0] != "uniap_tune" or entry(imported) == own:
            continue
        assert RANK[entry(imported)] < RANK[own], f"{module} ({own}) must not import {imported}"


@pytest.mark.parametrize("module", modules())
def test_packages_from_outside_have_their_owners(module: str) -> None:
    for imported in imports(module):
        package = imported.split(".")[0]
        if package == "uniap_tune" or package in sys.stdlib_module_names:
            continue
        assert package in OUTSIDE, f"{module} imports {package}, which is not in the table"
        owners = OUTSIDE[package]
        assert owners is None or entry(module) in owners, f"only {owners} may import {package}, not {module}"


@pytest.mark.parametrize("module", modules())
def test_adapters_import_each_other_relatively_and_the_core_absolutely(module: str) -> None:
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            relative = node.level > 0
            inside = absolute(node, module).startswith("uniap_tune.adapters")
            assert relative == (inside and entry(module) == "adapters"), f"{module}:{node.lineno}"


def test_no_cycles() -> None:
    known = modules()
    graph = {module: {name for name in imports(module) if name in known and name != module} for module in known}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which shows the cycle
    assert len(order) == len(known)


HEAVY = {
    "numpy",
    "pulp",
    "torch",
    "rich",
    "jinja2",
    "yaml",
    "ruamel",
    "psutil",
    "transformers",
    "deepspeed",
    "megatron",
}
RUN_MAIN = """
import json, sys
from uniap_tune.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(json.dumps({"code": code or 0, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *shown, last = run.stdout.splitlines()
    result = json.loads(last)
    assert result["code"] == 0
    assert shown
    assert HEAVY.isdisjoint(result["modules"])
