"""``--autotune uniap`` in DeepSpeed's own launcher, without a change to its files.

:func:`install` is called when Python starts, by the line that ``uniap-tune deepspeed enable`` writes, or by
``uniap-tune deepspeed …``. It waits for ``deepspeed.launcher.runner`` to be imported and changes two things in it: its
parser learns the options, and its ``main`` hands over when they are used. Everything else goes on as before. Nothing is
imported here but the standard library, because this runs before DeepSpeed.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_RUNNER = "deepspeed.launcher.runner"
_NEEDED = ("main", "parse_args", "fetch_hostfile", "parse_inclusion_exclusion", "get_accelerator", "argparse")
_DONE = "__uniap_tune__"


def install() -> None:
    """Patch the launcher, now if it is imported already, else when it is."""
    module = sys.modules.get(_RUNNER)
    if module is not None:
        patch(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the launcher as everybody does, and patches it once it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The launcher's spec with a loader that patches; ``None`` for every other module."""
        if fullname != _RUNNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and a patch of what it has loaded."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        created: ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Load, then patch."""
        self.inner.exec_module(module)
        patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def patch(runner: Any) -> bool:
    """Teach a launcher the options. A launcher of another make is left alone, with one line on stderr.

    Returns:
        Whether it is patched.
    """
    if getattr(runner, _DONE, False):
        return True
    missing = [name for name in _NEEDED if not hasattr(runner, name)]
    if missing:
        _unknown(f"its launcher has no {', '.join(missing)}")
        return False
    original_main, original_parse, original_argparse = runner.main, runner.parse_args, runner.argparse
    parsers = _Parsers(original_argparse)
    runner.argparse = parsers

    def parse_args(args: Sequence[str] | None = None) -> Any:
        options = original_parse(args)
        if getattr(options, "autotune", "") and not options.autotuning:
            options.autotuning = "tune"
        return options

    def main(args: Sequence[str] | None = None) -> None:
        options = parse_args(args)
        if not parsers.taught:
            _unknown("its launcher has no --autotuning")
        elif _wanted(options):
            words = list(sys.argv[1:] if args is None else args)
            _leave(lambda: _tune(runner, options, words))
            return
        original_main(args)

    runner.parse_args, runner.main = parse_args, main
    setattr(runner, _DONE, True)
    return True


class _Parsers:
    """``argparse`` as the launcher sees it: its parser gets our options beside ``--autotuning``."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.taught = False
        outer = self

        class Parser(argparse.ArgumentParser):
            """A parser that adds our options where ``--autotuning`` is added."""

            def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
                action = super().add_argument(*names, **settings)
                if "--autotuning" in names:
                    outer.taught = True
                    _add_options(super().add_argument)
                return action

        self.ArgumentParser = Parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _add_options(add: Callable[..., argparse.Action]) -> None:
    from uniap_tune.deepspeed.options import FLAG, KEYS

    add(
        "--autotune",
        default="",
        choices=["uniap"],
        type=str,
        help="Plan the parallel configuration with uniap-tune before running the job; with --autotuning run the job "
        "is then run. Results are in autotuning_results.",
    )
    for key in KEYS:
        add(f"{FLAG}{key}", default=argparse.SUPPRESS, metavar="VALUE", help=f'the key "{key}" of the "uniap" block')


def _wanted(options: Any) -> bool:
    """Whether the command asks for us, by ``--autotune`` or by ``tuner_type`` in its JSON."""
    if options.autotune == "uniap":
        return True
    if not options.autotuning:
        return False
    from uniap_tune.adapters.deepspeed import read_config
    from uniap_tune.deepspeed.launch import config_argument
    from uniap_tune.errors import InputError

    try:
        tuning = read_config(config_argument(options.user_args).path).get("autotuning")
    except InputError:
        return False  # DeepSpeed's own tuner says what it misses
    return isinstance(tuning, dict) and tuning.get("tuner_type") == "uniap"


def _tune(runner: Any, options: Any, words: Sequence[str]) -> int:
    from uniap_tune.deepspeed.autotune import run

    return run(runner, options, words, device_count=lambda: int(runner.get_accelerator().device_count()))


def _leave(work: Callable[[], int]) -> None:
    """Do the work and end the process with its exit code; 0 returns, as the launcher does."""
    from uniap_tune.errors import ExitCode, TuneError, message

    try:
        code = work()
    except TuneError as error:
        sys.stderr.write(message(error) + "\n")
        code = int(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        code = int(ExitCode.STOPPED)
    if code:
        sys.exit(code)


def _unknown(why: str) -> None:
    package = sys.modules.get("deepspeed")
    version = getattr(package, "__version__", "of an unknown version")
    sys.stderr.write(
        f"uniap-tune: --autotune uniap is not available with DeepSpeed {version} ({why}); "
        "use `uniap-tune plan --target deepspeed`\n"
    )
