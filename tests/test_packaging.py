"""What is installed: the exact contents of the wheel, and that wheel and editable install both work elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from uniap_tune import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = {"uniap_tune": "uniap_tune", "adapters": "uniap_tune/adapters", "templates": "uniap_tune/templates"}
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""

CHECK = """
import importlib.util
from importlib import metadata, resources

import uniap_tune
import uniap_tune.adapters
import uniap_tune.templates
from uniap_tune.hardware import device

assert importlib.util.find_spec("adapters") is None, "a bare top-level adapters can be imported"
assert importlib.util.find_spec("templates") is None, "a bare top-level templates can be imported"
assert importlib.util.find_spec("uniap_tune.adapters.huggingface") is not None
assert uniap_tune.__version__ == metadata.version("uniap-tune")
assert device("h100").memory_bytes > 0
data = resources.files("uniap_tune.data")
assert any(data.joinpath("models").iterdir()) and any(data.joinpath("clusters").iterdir())
assert next(iter(metadata.entry_points(group="console_scripts", name="uniap-tune"))).value == "uniap_tune.cli:main"
print(uniap_tune.__file__)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because building writes beside them."""
    copy = tmp_path_factory.mktemp("project") / "uniap-tune"
    copy.mkdir()
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(project: Path, kind: str, target: Path) -> Path:
    """Calls the build backend as pip and build do, without the network."""
    run = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(target)],
        cwd=project, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(project, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(project: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(project, "editable", tmp_path_factory.mktemp("editable"))


def sources() -> Iterator[str]:
    """Every file below the packages' folders, by its name in the wheel; notes for their editors are not shipped."""
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                yield f"{package}/{path.relative_to(ROOT / folder).as_posix()}"


def test_the_wheel_holds_exactly_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    info = f"uniap_tune-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"uniap_tune", info}
    assert {name for name in names if not name.startswith(info)} == set(sources())
    assert {"uniap_tune/py.typed", "uniap_tune/adapters/huggingface.py", "uniap_tune/data/devices.toml"} <= set(names)
    assert f"{info}/licenses/LICENSE" in names


def test_files_of_one_kind_live_where_they_belong() -> None:
    suffixes = {
        folder: {Path(name).suffix for name in sources() if name.startswith(package)}
        for folder, package in FOLDERS.items()
    }
    assert suffixes["adapters"] == {".py"}
    assert suffixes["templates"] <= {".py", ".j2"}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_it_works_from_anywhere(
    kind: str, project: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Installs by unpacking, which is all that installing a pure wheel is, into an empty environment."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    with zipfile.ZipFile(request.getfixturevalue(kind)) as archive:
        archive.extractall(site)
    python = Path(sysconfig.get_path("scripts", "venv", {"base": str(environment)})) / Path(sys.executable).name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [python, "-c", CHECK], cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert Path(run.stdout.strip()).is_relative_to(project if kind == "editable" else site)
