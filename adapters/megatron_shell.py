"""Megatron-LM launch scripts: read without running them, written back with a few lines changed.

What the plan sets goes into an array ``TUNED_ARGS`` behind all other arguments, where argparse lets it win. What has to
go, because nothing on a command line can undo it, is deleted where it stands.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uniap_tune.errors import InputError
from uniap_tune.recipe import Argument, Changes, ClusterHints, Recipe
from uniap_tune.spec import Cluster

from .arguments import Occurrence, occurrences, winning
from .bash_run import Launch, ScriptRun, run_script
from .bash_text import known
from .capture import capture
from .megatron import build_recipe
from .megatron_flags import RELEVANT
from .shell_block import Block, find_block, header_line
from .shell_edit import Editor, deletion, node_directives

_NODES = ("nnodes",)
_POSIX = re.compile(r"#![ \t]*(/usr)?/bin/(env[ \t]+)?(sh|dash)\b")
_PER_NODE = ("nproc-per-node", "nproc_per_node")


@dataclass(frozen=True, slots=True)
class ShellSource:
    """A script, the files it sources, and the launch that was found in it."""

    run: ScriptRun
    launch: Launch
    found: tuple[Occurrence, ...]
    given: Mapping[str, str]
    was_executed: bool = False

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return "Megatron-LM launch script"

    @property
    def name(self) -> str:
        """The script's path."""
        return self.run.files[0].name

    def originals(self) -> dict[str, str]:
        """The texts of the files by their names in the output; those outside of the script's folder are not changed."""
        own = [number for number in range(len(self.run.files)) if self._is_own(number)]
        return {self._relative(number): self.run.files[number].text for number in own}

    def _relative(self, number: int) -> str:
        return str(self.run.files[number].path.resolve().relative_to(self._folder))

    @property
    def _folder(self) -> Path:
        return self.run.files[0].path.parent.resolve()

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """See :class:`~uniap_tune.recipe.Source`; what only running it could tell is taken as it was."""
        instead = {self._folder / name: text for name, text in files.items()}
        captured = self._recaptured(files) if self.was_executed else None
        return read_shell(self.run.files[0].path, self.given, captured, instead)

    def _recaptured(self, files: Mapping[str, str]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="")
            return capture(Path(folder) / self.run.files[0].path.name, self.given)

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:
        """The files with the changes; see :class:`~uniap_tune.recipe.Source`."""
        editor = Editor([file.text for file in self.run.files])
        block = find_block(self.run.files[self.launch.file].text)
        for item in self.found:
            place = item.flag.origin
            in_block = place is not None and block is not None and place.file == self.launch.file and place in block
            if item.name in changes.removed and not in_block:
                self._delete(editor, item)
        self._set_devices(editor, cluster)
        environment = self._set_prefixes(editor, changes.environment)
        self._write_block(editor, block, Changes(changes.values, changes.removed, environment))
        self._write_header(editor, header)
        own = {number: text for number, text in enumerate(editor.texts()) if self._is_own(number)}
        return {self._relative(number): text for number, text in own.items()}

    def _delete(self, editor: Editor, item: Occurrence) -> None:
        place = item.flag.origin
        if place is None or not self._is_own(place.file):
            raise InputError(
                f"{self.run.where(item.flag.place)}: --{item.name} must go, but is not written out in the script",
                why="the plan excludes it, and no argument behind it can undo it",
                fix="write it out, or delete it",
            )
        text = self.run.files[place.file].text
        span = deletion(text, place, len(item.values), item.joined)
        if span is None:
            raise InputError(
                f"{self.run.where(place)}: --{item.name} must go, but its values are not written beside it",
                fix="delete it by hand",
            )
        editor.replace(place.file, *span, "")

    def _is_own(self, number: int) -> bool:
        return self.run.files[number].path.resolve().is_relative_to(self._folder)

    def _set_devices(self, editor: Editor, cluster: Cluster) -> None:
        """Nodes and processes of the launcher, and of the directives of Slurm."""
        launcher = occurrences(self.launch.launcher)
        wanted = {**dict.fromkeys(_NODES, cluster.num_nodes), **dict.fromkeys(_PER_NODE, cluster.devices_per_node)}
        for item in launcher:
            number = wanted.get(item.name)
            value = item.values[0] if item.values else None
            if number is None or value is None or value.text == str(number):
                continue
            origin = value.origin
            if origin is not None and value.text.isdecimal() and self._is_own(origin.file):
                editor.replace(origin.file, origin.start, origin.end, str(number))
        for start, end, number in node_directives(self.run.files[0].text, cluster):
            editor.replace(0, start, end, str(number))

    def _set_prefixes(self, editor: Editor, environment: Mapping[str, str | None]) -> dict[str, str | None]:
        """Variables set in front of the command itself are changed there; returns the others."""
        left = dict(environment)
        for assign in self.launch.command.assigns:
            if assign.name in left:
                value = left.pop(assign.name)
                replacement = "" if value is None else f"{assign.name}={value}"
                editor.replace(self.launch.file, assign.start, assign.end, replacement)
        return left

    def _write_block(self, editor: Editor, old: Block | None, changes: Changes) -> None:
        block = old or Block()
        block = block.changed(changes)
        if old is not None:
            editor.replace(self.launch.file, old.start, old.end, block.render(old.indent))
            return
        if block.is_empty:
            return
        self._require_arrays()
        self._hook(editor)
        text = self.run.files[self.launch.file].text
        start = _statement_line(text, self.launch.command.start)
        indent = re.match(r"[ \t]*", text[start:])
        editor.replace(self.launch.file, start, start, block.render(indent.group() if indent else ""))

    def _require_arrays(self) -> None:
        """The block is bash's. A script of sh that has arrays already runs where sh is bash."""
        script = self.run.files[0]
        if _POSIX.match(script.text) and "=(" not in script.text:
            raise InputError(
                f"{script.where(0)}: the tuned arguments need bash",
                why="they are an array, and the first line asks for sh",
                fix="let the script begin with #!/bin/bash",
            )

    def _hook(self, editor: Editor) -> None:
        """Puts the array behind the arguments of the launch."""
        command, file = self.launch.command, self.launch.file
        text = self.run.files[file].text
        if not self.launch.reparsed:
            last = command.words[-1]
            written = text[last.start : last.end]
            if written in ('"$@"', "$@", '"${@}"', "${@}"):
                editor.replace(file, last.start, last.start, f'"${{TUNED_ARGS[@]}}"{_joint(text, last.start)}')
            else:
                joint = _joint(text, last.start)
                editor.replace(file, last.end, last.end, f'{joint}"${{TUNED_ARGS[@]}}"')
            return
        hook = "${TUNED_ARGS[*]@Q}"
        if command.words[0].bare == "eval":
            editor.replace(file, command.end, command.end, f' "{hook}"')
            return
        last = command.words[-1]
        if not self.launch.is_last or text[last.end - 1] != '"':
            raise InputError(
                f"{self.run.files[file].where(command.start)}: no place for the tuned arguments",
                why="the training command is inside a string, with something behind it",
                fix='start it as the last command of a "…" string',
            )
        editor.replace(file, last.end - 1, last.end - 1, f" {hook}")

    def _write_header(self, editor: Editor, header: str) -> None:
        start, end, line = header_line(self.run.files[0].text, header)
        editor.replace(0, start, end, line)


def _statement_line(text: str, offset: int) -> int:
    """The start of the line on which the statement around an offset begins."""
    start = text.rfind("\n", 0, offset) + 1
    while start:
        before = text.rfind("\n", 0, start - 1) + 1
        line = text[before:start].rstrip("\r\n")
        if not line.endswith("\\") and not line.rstrip().endswith(("&&", "||", "|")):
            break
        start = before
    return start


def _joint(text: str, word_start: int) -> str:
    """What separates a word from the next one, in the way of the line it is on."""
    line = text[text.rfind("\n", 0, word_start) + 1 : word_start]
    is_first = text[: word_start - len(line)].endswith("\\\n") and not line.strip()
    return f" \\\n{line}" if is_first else " "


def read_shell(
    path: Path,
    given: Mapping[str, str] | None = None,
    captured: Sequence[str] | None = None,
    instead: Mapping[Path, str] | None = None,
) -> Recipe:
    """The recipe of a launch script.

    Args:
        path: the script.
        given: values of variables it leaves open.
        captured: the arguments it really started training with, if it was run for that.
        instead: texts that stand for those of files, by their resolved paths.

    Raises:
        InputError: it cannot be read, starts no training, or leaves open what matters; names file and line.
    """
    run = run_script(path, given, instead)
    launch = _training(run)
    found = occurrences(launch.arguments)
    arguments = winning(found, run.where)
    notes: list[str] = []
    if captured is None:
        _refuse_skipped(run, arguments)
    else:
        arguments = _captured(captured, arguments, run.files[0].name)
        notes.append("arguments were taken from a run of the script with a stand-in for its launcher")
    loose = [text.unknown for text in launch.words if text.unknown and not text.text]
    notes += [f"left open: {reason}" for reason in dict.fromkeys(loose)]
    environment = {name: text.text for name, text in launch.environment.items() if not text.unknown}
    source = ShellSource(run, launch, tuple(found), given or {}, captured is not None)
    return build_recipe(path, source, arguments, environment=environment, hints=_hints(launch), notes=tuple(notes))


def _training(run: ScriptRun) -> Launch:
    for launch in reversed(run.launches):
        names = {item.name for item in occurrences(launch.arguments)}
        if "num-layers" in names or "hidden-size" in names:
            return launch
    if run.launches:
        last = run.launches[-1]
        raise InputError(
            f"{run.files[last.file].where(last.command.start)}: {last.words[last.script].text} gets no --num-layers",
            why="the arguments that describe the model are not on its command line",
            fix="give a script whose arguments are visible, or read it with --execute",
        )
    raise InputError(
        f"{run.files[0].name}: starts no python training script",
        why=run.unfollowed or "no command with a .py file was found",
        fix="give the script that calls torchrun, or read it with --execute",
    )


def _refuse_skipped(run: ScriptRun, arguments: Mapping[str, Argument]) -> None:
    """Arguments that matter in a branch nobody knows to be taken."""
    for flag, (origin, reason) in run.skipped.items():
        name = flag.removeprefix("--")
        if name in RELEVANT:
            known = f" (elsewhere it is given at {arguments[name].where})" if name in arguments else ""
            raise InputError(
                f"{run.where(origin)}: whether {flag} is given is not known{known}",
                why=reason,
                fix="give what it depends on with --set NAME=VALUE, or let the script run with --execute",
            )


def _captured(words: Sequence[str], static: Mapping[str, Argument], name: str) -> dict[str, Argument]:
    found = winning(occurrences([known(word) for word in words]), lambda _: name)
    return {
        key: Argument(key, item.values, static[key].where if key in static else item.where)
        for key, item in found.items()
    }


def _hints(launch: Launch) -> ClusterHints:
    values = {item.name: item.values[0].text for item in occurrences(launch.launcher) if item.values}
    nodes = next((values[name] for name in _NODES if values.get(name, "").isdecimal()), None)
    devices = next((values[name] for name in _PER_NODE if values.get(name, "").isdecimal()), None)
    return ClusterHints(
        num_nodes=int(nodes) if nodes and len(nodes) < 8 else None,
        devices_per_node=int(devices) if devices and len(devices) < 8 else None,
    )
