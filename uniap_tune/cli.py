"""The ``uniap-tune`` command: parses, dispatches, and turns every error into one clear message and an exit code.

Command modules are imported to describe themselves; what they need to run they import when they run.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from uniap_tune import __version__
from uniap_tune.errors import ExitCode, InputError, TuneError, message

# In the order of --help.
_COMMANDS = ("plan", "explain", "frontier", "tune", "doctor", "solve", "predict", "accuracy", "deepspeed")

# Of a write to stdout: a full disk, an exceeded quota or file size, a failing device.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_EPILOG = """exit codes: 0 ok, 1 internal error, 2 bad input, 3 no plan fits, 4 out of memory predicted,
5 stopped without a plan, 6 drift. Data goes to stdout, everything else to stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (until the end)
    modules = [import_module(f"uniap_tune.commands.{name}") for name in _COMMANDS]
    passing = {module.NAME: module.pass_through for module in modules if hasattr(module, "pass_through")}
    try:
        if arguments and arguments[0] in passing:  # its arguments are another program's: nothing here parses them
            code = int(passing[arguments[0]](arguments[1:]))
        else:
            args = _parser(modules).parse_args(arguments)
            code = int(args.run(args))
        sys.stdout.flush()
    except TuneError as error:
        _report(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        return int(ExitCode.STOPPED)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _drop_output()
        return int(ExitCode.OK)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE and error.filename is None:
            _drop_output()
            _report(InputError("the output cannot be written", why=os.strerror(error.errno), fix="send it elsewhere"))
            return int(ExitCode.BAD_INPUT)
        if os.environ.get("UNIAP_TUNE_DEBUG"):
            raise
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        print("  this is a bug; run again with UNIAP_TUNE_DEBUG=1 for its trace", file=sys.stderr)  # noqa: T201
        return int(ExitCode.INTERNAL)
    return code


def _parser(modules: Sequence[ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniap-tune",
        description="Plan the parallelism of LLM training: proven-optimal Megatron and DeepSpeed configurations.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in modules:
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _drop_output() -> None:
    """What is still buffered for stdout goes nowhere, so that the interpreter does not fail on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: TuneError) -> None:
    print(message(error), file=sys.stderr)  # noqa: T201
