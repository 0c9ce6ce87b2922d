"""What a script really starts training with: the script is run, with stand-ins for everything that would start.

Only when the user asks for it, because this executes the script. It runs in an environment without the user's
variables, with a time limit, in a folder of its own, and ``torchrun``, ``python``, ``srun`` and the like only write
down their arguments.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from uniap_tune.errors import InputError

from .documents import printable

TIME_LIMIT_S = 20.0
_LARGEST = 1 << 20

# Programs that start training, or that start those that do.
_STAND_INS = ("torchrun", "python", "python3", "deepspeed", "accelerate", "mpirun", "srun", "sbatch", "docker")

# Writes its arguments down, each ended by a NUL byte; a shell it was to start is started, so that what that would have
# started is seen.
_STAND_IN = """#!/bin/bash
{ printf '%s\\0' "$@"; printf '\\n'; } >> "$UNIAP_TUNE_CAPTURE"
while (( $# > 2 )); do
  case "$1" in
    bash|sh|/bin/bash|/bin/sh) case "$2" in -*c) exec /bin/bash -c "$3" ;; esac ;;
  esac
  shift
done
exit 0
"""


def capture(path: Path, given: Mapping[str, str], *, time_limit_s: float = TIME_LIMIT_S) -> list[str]:
    """The arguments behind the name of the training script.

    Args:
        path: the script to run.
        given: variables of its environment.
        time_limit_s: seconds after which it is stopped.

    Raises:
        InputError: it did not end in time, or started no training script.
    """
    where = printable(str(path))
    with tempfile.TemporaryDirectory() as folder:
        tools, record = Path(folder) / "bin", Path(folder) / "record"
        tools.mkdir()
        for name in _STAND_INS:
            tool = tools / name
            tool.write_text(_STAND_IN, encoding="utf-8")
            tool.chmod(0o755)
        work = Path(folder) / "work"
        work.mkdir()
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(work),
            "TMPDIR": str(work),
            "UNIAP_TUNE_CAPTURE": str(record),
            **{name: value for name, value in given.items() if name.isidentifier()},
        }
        _run(path, work, environment, time_limit_s)
        raw = record.read_bytes()[:_LARGEST] if record.is_file() else b""
    for line in reversed(raw.split(b"\0\n")):
        words = line.decode(errors="replace").split("\0")
        script = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None and any(word.startswith("--num-layers") for word in words[script:]):
            return words[script + 1 :]
    raise InputError(
        f"{where}: started no training script with --num-layers",
        why=f"it was run with stand-ins for {', '.join(_STAND_INS[:3])} and others",
        fix="give what it needs with --set NAME=VALUE",
    )


def _run(path: Path, folder: Path, environment: Mapping[str, str], time_limit_s: float) -> None:
    process = subprocess.Popen(
        ["/bin/bash", str(path.resolve())],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{printable(str(path))}: did not end within {time_limit_s:.0f} s",
            fix="read it without --execute, with --set for what it leaves open",
        ) from None
    finally:  # also whatever it left running
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
