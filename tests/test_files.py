"""Writing files: all or none, never over others unasked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from uniap_tune.errors import InputError
from uniap_tune.files import write_files

FILES = {"plan.json": "{}\n", "launch.sh": "#!/bin/sh\n", "deep/notes.txt": "größer\n"}


def test_writes_everything_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_files(folder, FILES, executable=("launch.sh",))
    assert {name: (folder / name).read_text(encoding="utf-8") for name in FILES} == FILES
    assert os.access(folder / "launch.sh", os.X_OK)
    assert not os.access(folder / "plan.json", os.X_OK)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["launch.sh", "notes.txt", "plan.json"]


def test_permissions_follow_the_mask_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_files(tmp_path, FILES, executable=("launch.sh",))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "launch.sh").stat().st_mode) == 0o750


def test_line_ends_are_written_as_they_are(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": "x\ny\r\n"})
    assert (tmp_path / "a").read_bytes() == b"x\ny\r\n"


def test_refuses_to_overwrite_and_then_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(InputError) as caught:
        write_files(tmp_path, FILES)
    assert str(tmp_path / "plan.json") in caught.value.what
    assert "--force" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is there already"):
        write_files(tmp_path, FILES)


def test_force_overwrites_files_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("old")
    (tmp_path / "other").write_text("other")
    write_files(tmp_path, FILES, force=True)
    assert (tmp_path / "plan.json").read_text() == "{}\n"
    assert (tmp_path / "other").read_text() == "other"


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("old")
    written = []

    def full_disk(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("uniap_tune.files.os.fsync", full_disk)
    with pytest.raises(InputError) as caught:
        write_files(tmp_path, FILES, force=True)
    assert caught.value.why == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


def test_an_interruption_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uniap_tune.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"plan.json": "{}"})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError) as caught:
        write_files(tmp_path / "out", FILES)
    assert caught.value.what == f"{tmp_path}/out/plan.json: cannot be written"


def test_a_folder_nobody_may_make() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_files(Path("/proc/uniap-tune"), FILES)  # not even root may


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_files(tmp_path, {"plan.json": "{}"}, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_in_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        write_files(tmp_path, {"a": "1", "b": "2"}, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
