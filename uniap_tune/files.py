"""Writing a set of files: all of them or none, never over what is there unless asked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from uniap_tune.errors import InputError

_MODE = 0o666
_EXECUTABLE_MODE = 0o777


def write_files(
    folder: Path, files: Mapping[str, str], *, force: bool = False, executable: Collection[str] = ()
) -> None:
    """Write ``files`` (name -> text, UTF-8) into ``folder``, which is made if need be.

    Everything is written beside its place first and renamed at the end, so a full disk or an interruption leaves the
    files as they were. A rename can still fail; then those already renamed stay.

    Args:
        folder: where they go.
        files: relative names; a name may have folders in it.
        force: replace files that are there.
        executable: the names that are made executable.

    Raises:
        InputError: a file is there and ``force`` is not given, or the folder cannot be written.
    """
    targets = {name: folder / name for name in files}
    if not force:
        _refuse_existing(targets.values())
    _refuse_folders(targets.values())
    mask = _umask()
    waiting: dict[Path, Path] = {}
    target = folder
    try:
        for name, text in files.items():
            target = targets[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = (_EXECUTABLE_MODE if name in executable else _MODE) & ~mask
            waiting[target] = _write_beside(target, text, mode)
        for target in list(waiting):
            waiting[target].replace(target)
            del waiting[target]
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written",
            why=error.strerror or str(error),
            fix="choose a place that you may write to, on a disk with room",
        ) from error
    finally:
        for temporary in waiting.values():
            with suppress(OSError):
                temporary.unlink()


def _refuse_existing(targets: Collection[Path]) -> None:
    there = [str(target) for target in targets if target.exists() or target.is_symlink()]
    if there:
        raise InputError(
            f"{there[0]}: is there already",
            why="nothing is overwritten unasked" + (f" ({len(there)} files would be)" if len(there) > 1 else ""),
            fix="use --force, or choose another place",
        )


def _refuse_folders(targets: Collection[Path]) -> None:
    folder = next((str(target) for target in targets if target.is_dir()), None)
    if folder is not None:
        raise InputError(f"{folder}: cannot be written", why="it is a folder", fix="move it, or choose another place")


def _write_beside(target: Path, text: str, mode: int) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(mode)
    except BaseException:  # an interruption too
        temporary.unlink()
        raise
    return temporary


def _umask() -> int:
    """The process's file mode mask, which mkstemp does not apply."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
