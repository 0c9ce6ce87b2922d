"""The opt-in line by which Python installs the hook: a ``.pth`` file that acts on ``deepspeed --autotun…`` alone.

The file is entered into the ``RECORD`` of the installed package, so that ``pip uninstall uniap-tune`` takes it away
too. Should it be left behind nevertheless, it finds no package and does nothing.
"""

from __future__ import annotations

import csv
import io
import os
import site
import sysconfig
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from uniap_tune.errors import InputError

FILE = "uniap_tune_deepspeed.pth"

# One line, because that is what a .pth file executes. It costs a look at the arguments, and goes on only for
# DeepSpeed's command with a tuning option; options of Python's own may stand before the command's name.
LINE = (
    "import sys; a = getattr(sys, 'orig_argv', ()); "
    "any(w.partition('=')[0] in ('--autotune', '--autotuning') for w in a)"
    " and any(w.rpartition('/')[2] in ('deepspeed', 'deepspeed.pt', 'ds') for w in a[1:4])"
    " and __import__('importlib.util').util.find_spec('uniap_tune')"
    " and __import__('uniap_tune.deepspeed.hook', fromlist=['install']).install()\n"
)


@dataclass(frozen=True, slots=True)
class Status:
    """Where the line is, and whether it is as this version writes it."""

    path: Path
    enabled: bool
    current: bool


def status() -> list[Status]:
    """Every place where the line is or would be; the first is where :func:`enable` writes it."""
    found = []
    for folder in _folders():
        path = folder / FILE
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            text = ""
        found.append(Status(path, path.exists(), text == LINE))
    return found


def enable() -> Path:
    """Write the line where this Python reads it at its start.

    Raises:
        InputError: no such place can be written.
    """
    path = _writable() / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        temporary.write_text(LINE, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written", why=error.strerror or "", fix=_FIX) from None
    _own(path, owned=True)
    return path


def disable() -> list[Path]:
    """Remove the line wherever it is; returns the files that are gone.

    Raises:
        InputError: one cannot be removed.
    """
    gone = []
    for place in status():
        if place.enabled:
            try:
                place.path.unlink()
            except OSError as error:
                raise InputError(
                    f"{place.path}: cannot be removed", why=error.strerror or "", fix="remove it"
                ) from None
            gone.append(place.path)
        _own(place.path, owned=False)
    return gone


_FIX = "use an environment of your own, or `uniap-tune deepspeed …` in place of `deepspeed …`"


def _folders() -> list[Path]:
    """Folders whose ``.pth`` files this Python reads; first that of this package, whose fate the line then shares."""
    places = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        places.append(Path(site.getusersitepackages()))
    record = _record()
    home = record.parent.parent if record is not None else None
    return sorted(dict.fromkeys(places), key=lambda place: place != home)


def _writable() -> Path:
    for folder in _folders():
        if os.access(folder, os.W_OK):
            return folder
    raise InputError("no folder that Python reads at its start can be written", why=str(_folders()[0]), fix=_FIX)


def _own(path: Path, *, owned: bool) -> None:
    """Enter the file into the package's list of installed files, or take it out."""
    record = _record()
    if record is None:
        return
    base = record.parent.parent
    name = os.path.relpath(path, base).replace(os.sep, "/")
    rows = [row for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))) if row]
    kept = [row for row in rows if row[0] != name]
    if owned:
        kept.append([name, "", ""])
    if kept == rows:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(kept)
    temporary = record.with_name(f"RECORD.{os.getpid()}")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        raise InputError(f"{record}: cannot be written", why=error.strerror or "", fix=_FIX) from None


def _record() -> Path | None:
    """The ``RECORD`` of this package; ``None`` when it was not installed by pip."""
    for found in distributions(name="uniap-tune"):  # a checkout in the current folder is one too, without a RECORD
        for file in found.files or ():
            if file.name == "RECORD" and file.parent.name.endswith(".dist-info"):
                return Path(str(found.locate_file(file)))
    return None
