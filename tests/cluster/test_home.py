"""The data folder: made once, upgraded by newer code, refused by older code, explained when the disk refuses."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import HomeError
from cluster.home import (
    MIGRATIONS,
    Home,
    Migration,
    default_root,
    explain_disk_errors,
    open_home,
    read_version,
    require_space,
)


def test_a_new_folder_gets_its_layout_and_version(tmp_path: Path) -> None:
    home = open_home(tmp_path / "deep" / "home")
    assert read_version(home) == MIGRATIONS[-1].version
    assert all(path.is_dir() for path in (home.models, home.qdrant, home.blobs, home.logs, home.run))
    assert not list(home.root.glob(".probe*"))


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home")
    (home.blobs / "kept").write_text("x")
    before = sorted(path.relative_to(home.root) for path in home.root.rglob("*"))
    open_home(home.root)
    assert sorted(path.relative_to(home.root) for path in home.root.rglob("*")) == before


def test_the_place_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDFARM_HOME", "/somewhere/mine")
    assert default_root() == Path("/somewhere/mine")
    monkeypatch.delenv("WINDFARM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_root() == Path("/data/windfarm")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == Path("/home/someone/.local/share/windfarm")


def test_newer_code_runs_only_the_missing_migrations_in_order(tmp_path: Path) -> None:
    open_home(tmp_path)
    ran: list[int] = []
    newer = (
        Migration(1, "first", lambda home: ran.append(1)),
        Migration(2, "second", lambda home: ran.append(2)),
        Migration(3, "third", lambda home: ran.append(3)),
    )
    home = open_home(tmp_path, migrations=newer)
    assert (ran, read_version(home)) == ([2, 3], 3)


def test_an_interrupted_upgrade_goes_on_where_it_stopped(tmp_path: Path) -> None:
    open_home(tmp_path)
    ran: list[int] = []

    def fail(home: Home) -> None:
        raise RuntimeError("power cut")

    second = Migration(2, "second", lambda home: ran.append(2))
    with pytest.raises(RuntimeError):
        open_home(tmp_path, migrations=(*MIGRATIONS, second, Migration(3, "third", fail)))
    assert read_version(Home(tmp_path)) == 2
    open_home(tmp_path, migrations=(*MIGRATIONS, second, Migration(3, "third", lambda home: ran.append(3))))
    assert ran == [2, 3]


def test_older_code_refuses_a_newer_folder_and_leaves_it_alone(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    (tmp_path / "version.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(HomeError, match=r"newer windfarm \(folder version 99.*Update windfarm"):
        open_home(tmp_path)
    assert read_version(home) == 99


def test_a_damaged_version_file_is_named(tmp_path: Path) -> None:
    open_home(tmp_path)
    (tmp_path / "version.json").write_text("{")
    with pytest.raises(HomeError, match=r"version\.json is damaged"):
        open_home(tmp_path)


def test_a_folder_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.odt").write_text("mine")
    with pytest.raises(HomeError, match=r"not a windfarm data folder.*thesis\.odt"):
        open_home(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.odt"]


def test_a_first_start_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / ".probe.123").write_bytes(b"")
    assert read_version(open_home(tmp_path)) == MIGRATIONS[-1].version


def test_a_file_in_the_place_of_the_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HomeError, match=r"a file of that name is in the way"):
        open_home(tmp_path / "file")
    with pytest.raises(HomeError, match=r"a part of the path is a file"):
        open_home(tmp_path / "file" / "home")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "may not write"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EBUSY, "busy")],
)
def test_every_refusal_of_the_disk_becomes_cause_and_next_step(number: int, words: str) -> None:
    with pytest.raises(HomeError, match=rf"/data: .*{words}.*WINDFARM_HOME"), explain_disk_errors(Path("/data")):
        raise OSError(number, os.strerror(number))


_IN_SMALL_FILE_SYSTEM = """
import sys
from pathlib import Path
from cluster.errors import HomeError
from cluster.home import open_home
try:
    open_home(Path(sys.argv[1]))
except HomeError as error:
    print(error)
"""


@pytest.mark.requires("tmpfs")
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("head -c 2m /dev/zero > {0}/models 2>/dev/null; true", "the disk is full"),
        ("mount -o remount,ro {0}", "read-only file system"),
    ],
)
def test_a_full_or_read_only_disk_is_explained_even_to_root(tmp_path: Path, prepare: str, message: str) -> None:
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && {prepare.format(tmp_path)} && exec "$0" -c "$1" {tmp_path}'
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, _IN_SMALL_FILE_SYSTEM],
        capture_output=True,
        text=True,
        check=True,
    )
    assert message in answer.stdout
    assert "WINDFARM_HOME" in answer.stdout


def test_missing_space_is_told_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match=r"The model needs \d+ MiB in .* only \d+ MiB are free"):
        require_space(tmp_path, 2**60, "The model")
