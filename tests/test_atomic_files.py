"""Files and folders that are whole or not there, also where the disk is full or a rename fails."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from wanda_lightning.atomic_files import whole_file, whole_folder, write_text


def full(*_, **__):
    raise OSError(28, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    """What a user takes away from the rights to new files: of others to write, all of others, or as in a group."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_appears_when_all_of_it_is_written(tmp_path, umask):
    path = tmp_path / "far" / "new" / "picture.png"
    with whole_file(path) as unfinished:
        assert unfinished.suffix == ".png"  # matplotlib goes by it
        unfinished.write_bytes(b"picture")
        unfinished.chmod(0o600)
        assert not path.exists()
    assert names(path.parent) == ["picture.png"]
    assert path.read_bytes() == b"picture"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_appears_when_all_of_it_is_written(tmp_path, umask):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with whole_folder(folder) as unfinished:
        (unfinished / "inner").mkdir(mode=0o700)
        write_text(unfinished / "inner" / "new.txt", "new")
        (unfinished / "inner" / "new.txt").chmod(0o600)
        assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["inner"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == {"model": 0o777 & ~umask, "inner": 0o777 & ~umask, "new.txt": 0o666 & ~umask}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every folder does that, or none")
def test_what_is_in_the_folder_of_a_group_stays_the_group_s(tmp_path):
    tmp_path.chmod(0o2775)
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert (tmp_path / "model").stat().st_mode & 0o2000


@pytest.mark.parametrize("where", ["inside", "fsync", "rename"])
@pytest.mark.parametrize("older", [False, True])
def test_a_failed_write_leaves_what_was_there(where, older, tmp_path, monkeypatch):
    if older:
        with whole_folder(tmp_path / "model") as unfinished:
            (unfinished / "old.txt").write_text("old")
    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):  # noqa: PT012
        if where == "fsync":
            patch.setattr(os, "fsync", full)
        if where == "rename":
            patch.setattr(Path, "rename", lambda self, to: full() if self.name == "new" else rename(self, to))
        with whole_folder(tmp_path / "model") as unfinished:
            (unfinished / "new.txt").write_text("new")
            if where == "inside":
                full()
    assert names(tmp_path) == (["model"] if older else [])
    if older:
        assert names(tmp_path / "model") == ["old.txt"]


@pytest.mark.parametrize(("function", "error"), [("fsync", OSError), ("open", PermissionError)])
def test_a_file_that_cannot_be_written_leaves_what_was_there(function, error, tmp_path, monkeypatch):
    write_text(tmp_path / "report.md", "old")
    with (  # noqa: PT012
        monkeypatch.context() as patch,
        pytest.raises(error),
        whole_file(tmp_path / "report.md") as unfinished,
    ):
        unfinished.write_text("new")
        patch.setattr(os, function, Mock(side_effect=error))
    assert (names(tmp_path), (tmp_path / "report.md").read_text()) == (["report.md"], "old")


def test_what_is_written_is_on_the_disk_before_its_name_is_and_then_the_name(tmp_path, monkeypatch):
    events, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino) or flush(handle))
    monkeypatch.setattr(os, "replace", lambda *paths, do=os.replace: events.append("renamed") or do(*paths))
    monkeypatch.setattr(os, "rename", lambda *paths, do=os.rename: events.append("renamed") or do(*paths))
    write_text(tmp_path / "report.md", "a line")
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "config.json").write_text("{}")
    told = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
    around = tmp_path.name
    of_file, of_folder = ["report.md", "renamed", around], ["config.json", "model", "renamed", around]
    assert [told.get(event, event) for event in events] == of_file + of_folder


def test_the_user_s_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_text(Path("~/results/report.md"), "a line")
    with whole_folder(Path("~/results/first/run/model")):
        pass
    assert (names(tmp_path), names(tmp_path / "results")) == (["results"], ["first", "report.md"])


KILLED = """
import os
from pathlib import Path
from wanda_lightning.atomic_files import whole_folder
rename = Path.rename
Path.rename = lambda self, to: os._exit(9) if self.name == "new" else rename(self, to)
with whole_folder(Path("model")) as unfinished:
    (unfinished / "new.txt").write_text("new")
"""


def killed_before_the_last_step(folder):
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=folder, check=False).returncode == 9
    assert [name for name in names(folder) if not name.startswith(".model-")] == []


def test_what_a_write_that_was_killed_left_is_cleared_up(tmp_path):
    killed_before_the_last_step(tmp_path)
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "newer.txt").write_text("newer")
    assert (names(tmp_path), names(tmp_path / "model")) == (["model"], ["newer.txt"])


def test_what_was_there_before_a_write_that_was_killed_is_put_back(tmp_path):
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "old.txt").write_text("old")
    killed_before_the_last_step(tmp_path)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "model"):
        full()
    assert (names(tmp_path), names(tmp_path / "model")) == (["model"], ["old.txt"])


def test_a_write_that_goes_on_is_left_alone(tmp_path):
    (tmp_path / ".model-and-more").mkdir()  # somebody's own
    with whole_folder(tmp_path / "model") as unfinished:
        with whole_folder(tmp_path / "model") as other:
            (other / "first.txt").write_text("first")
        (unfinished / "last.txt").write_text("last")
    assert (names(tmp_path), names(tmp_path / "model")) == ([".model-and-more", "model"], ["last.txt"])


def test_windows_opens_no_folders_and_flushes_only_what_may_be_written(tmp_path, monkeypatch):
    may_be_written, opened, flush = set(), os.open, os.fsync

    def open_on_windows(path, flags, *rest, **settings):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        handle = opened(path, flags, *rest, **settings)
        may_be_written.discard(handle)
        if flags & (os.O_RDWR | os.O_WRONLY):
            may_be_written.add(handle)
        return handle

    def flush_on_windows(handle):
        if handle not in may_be_written:
            raise OSError(9, "Bad file descriptor")
        flush(handle)

    monkeypatch.setattr(os, "open", open_on_windows)
    monkeypatch.setattr(os, "fsync", flush_on_windows)
    write_text(tmp_path / "report.md", "a line\n")
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "config.json").write_text("{}")
    assert (tmp_path / "report.md").read_bytes() == b"a line\n"
    assert names(tmp_path / "model" / "inner") == ["config.json"]
