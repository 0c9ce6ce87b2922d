"""DeepSpeed's command line taken apart, put together again with a plan, and started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from uniap_tune.deepspeed.options import split_flags
from uniap_tune.deepspeed.pipeline import PLAN_VARIABLE
from uniap_tune.errors import InputError

_TUNING_FLAGS = ("--autotune", "--autotuning")
_WORKER = "uniap_tune.deepspeed.worker"
_SCRIPT_BYTES = 4 << 20

# Seconds a run has to end after each of the two signals that ask it to. DeepSpeed's launcher gives its ranks 30 s after
# SIGTERM before it kills them (launcher/launch.py, terminate_process_tree).
_GRACE_SECONDS = 35.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A ``deepspeed`` command without what addresses the tuner.

    Attributes:
        launcher: the launcher's own arguments.
        script: the user's script, module or program.
        arguments: the script's arguments.
        flags: ``--uniap_KEY`` values by key, wherever they stood.
        is_module, is_program: ``--module`` or ``--no_python`` was given.
    """

    launcher: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]
    flags: Mapping[str, str]
    is_module: bool = False
    is_program: bool = False

    @property
    def words(self) -> list[str]:
        """Everything after ``deepspeed``."""
        return [*self.launcher, self.script, *self.arguments]

    def text(self, environment: Mapping[str, str]) -> str:
        """The command for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        return " ".join([*settings, "deepspeed", *map(shlex.quote, self.words)])


def take_apart(
    argv: Sequence[str], script: str, arguments: Sequence[str], *, is_module: bool, is_program: bool
) -> Command:
    """The command, given what DeepSpeed's parser found in it.

    Args:
        argv: all words after ``deepspeed``.
        script: the user's script.
        arguments: the script's arguments, which are the last words.
    """
    head = list(argv[: len(argv) - len(arguments) - 1])
    kept: list[str] = []
    waiting = iter(head)
    for word in waiting:
        name, equals, _ = word.partition("=")
        if name in _TUNING_FLAGS:
            if not equals:
                next(waiting, None)
            continue
        kept.append(word)
    launcher, flags = split_flags(kept)
    rest, more = split_flags(arguments)
    return Command(
        launcher=tuple(launcher),
        script=script,
        arguments=tuple(rest),
        flags={**flags, **more},
        is_module=is_module,
        is_program=is_program,
    )


@dataclass(frozen=True, slots=True)
class ConfigArgument:
    """Where a script is told its DeepSpeed JSON. ``trainer``: by ``--deepspeed FILE``, as transformers' Trainer is."""

    path: Path
    index: int  # of the word that holds the path, after any "FLAG="
    prefix: str  # "FLAG=" or ""
    trainer: bool


def config_argument(arguments: Sequence[str]) -> ConfigArgument:
    """The DeepSpeed JSON among a script's arguments.

    Raises:
        InputError: there is none.
    """
    for flag, trainer in (("--deepspeed_config", False), ("--deepspeed", True)):
        for index, word in enumerate(arguments):
            if word.startswith(f"{flag}="):
                return ConfigArgument(Path(word.removeprefix(f"{flag}=")), index, f"{flag}=", trainer)
            following = arguments[index + 1 : index + 2]
            if word == flag and following and not following[0].startswith("-"):
                return ConfigArgument(Path(following[0]), index + 1, "", trainer)
    raise InputError(
        "no DeepSpeed JSON among the script's arguments",
        why="the plan is written into a copy of it",
        fix="add --deepspeed_config ds_config.json, or --deepspeed ds_config.json for transformers' Trainer",
    )


def value_of(arguments: Sequence[str], *names: str) -> str | None:
    """The value of the first of these options that is among the arguments."""
    for name in names:
        for index, word in enumerate(arguments):
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
            if word == name and index + 1 < len(arguments):
                return arguments[index + 1]
    return None


def with_value(arguments: Sequence[str], name: str, value: str | None) -> list[str]:
    """The arguments with an option set (``""``: a switch) or, for ``None``, without it."""
    kept: list[str] = []
    words = list(arguments)
    index = 0
    while index < len(words):
        if words[index] == name:
            index += 1
            if index < len(words) and not words[index].startswith("-"):
                index += 1
            continue
        if not words[index].startswith(f"{name}="):
            kept.append(words[index])
        index += 1
    return kept if value is None else [*kept, name, *([value] if value else [])]


def planned_command(
    command: Command,
    config: ConfigArgument,
    config_path: Path,
    *,
    batch: tuple[int, int],
    recompute: bool,
    trainer: bool,
) -> Command:
    """The command with the planned JSON and, for the Trainer, the arguments that must agree with it.

    Args:
        config: where the JSON stands.
        config_path: the planned JSON.
        batch: samples of a micro-batch on a rank, and micro-batches of a step.
        recompute: the plan recomputes activations.
        trainer: the script uses the Trainer of transformers.
    """
    arguments = list(command.arguments)
    arguments[config.index] = f"{config.prefix}{config_path}"
    if trainer:
        for name, value in (
            ("--per_device_train_batch_size", str(batch[0])),
            ("--gradient_accumulation_steps", str(batch[1])),
            ("--gradient_checkpointing", "True" if recompute else None),
        ):
            arguments = with_value(arguments, name, value)
    return replace(command, arguments=tuple(arguments))


def through_worker(command: Command) -> Command:
    """The command with its script run by :mod:`uniap_tune.deepspeed.worker`."""
    marker = ["-m"] if command.is_module else []
    launcher = [*command.launcher, *([] if command.is_module else ["--module"])]
    return replace(
        command,
        launcher=tuple(launcher),
        script=_WORKER,
        arguments=(*marker, command.script, *command.arguments),
        is_module=True,
    )


def script_mentions(command: Command, word: str) -> bool:
    """Whether the text of the user's script has this name in it; False when it cannot be read."""
    try:
        with Path(command.script).open(encoding="utf-8", errors="replace") as file:
            return re.search(rf"\b{re.escape(word)}\b", file.read(_SCRIPT_BYTES)) is not None
    except (OSError, ValueError):
        return False


def plan_environment(plan: Path) -> dict[str, str]:
    """What a pipeline's ranks find their plan by."""
    return {PLAN_VARIABLE: str(plan)}


def start(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run DeepSpeed's launcher with its output going where ours goes, and return its exit code.

    It gets a session of its own, so that an interruption can end exactly what was started here: the launcher and its
    ranks are asked first, as Ctrl-C would, then told, then killed.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *words],
        env={**os.environ, **environment},
        start_new_session=True,
    )
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not received and not _has_ended(child):
            time.sleep(_POLL_SECONDS)
        for number in (signal.SIGINT, signal.SIGTERM) if received else ():
            _ask(child, number)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # what the launcher left behind
        code = child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]  # the shell's way to write "ended by a signal"
    return 128 - code if code < 0 else code


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether the launcher has ended; it is not reaped, so that its number stays its own while the rest is ended."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _ask(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
    deadline = time.monotonic() + _GRACE_SECONDS
    while not _has_ended(child) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
