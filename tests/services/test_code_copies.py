"""What runs is a copy of the code of one moment: edits change its version and nothing else."""

import os
import py_compile
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.code_copies import REPOSITORY, copies, keep_copy, read_sources, remove_other_copies


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in ("services/parts/one.py", "rag/two.py", "ui/static/page.css", "tests/test_one.py", "ray_config.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "services/__init__.py").write_text("VALUE = 1\n")
    return root


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "services/__init__.py").write_text("VALUE = 2\n"),
        lambda root: (root / "ui/static/page.css").write_text("body {}"),
        lambda root: (root / "cluster").mkdir() or (root / "cluster/new.py").touch(),
        lambda root: (root / "rag/two.py").rename(root / "rag/three.py"),
        lambda root: (root / "rag/two.py").unlink(),
    ],
)
def test_every_change_of_the_code_is_another_version(checkout: Path, change: Callable[[Path], object]) -> None:
    before = read_sources(checkout).version
    assert read_sources(checkout).version == before
    change(checkout)
    assert read_sources(checkout).version != before


def test_what_is_not_the_code_is_no_other_version(checkout: Path) -> None:
    before = read_sources(checkout).version
    py_compile.compile(str(checkout / "rag/two.py"))
    for name in ("tests/test_one.py", "ray_config.yaml", "rag/.two.py.swp", "rag/two.py~"):
        (checkout / name).write_text("other")
    os.utime(checkout / "rag/two.py")
    assert read_sources(checkout).version == before


def test_the_product_itself_is_read_whole() -> None:
    files = read_sources().files
    tracked = subprocess.run(
        ["git", "ls-files", "cluster", "rag", "services", "ui"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "services/migrations/script.py.mako" in files
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= files.keys()


def test_a_copy_is_of_the_moment_when_it_was_read_and_stays(checkout: Path, tmp_path: Path) -> None:
    sources = read_sources(checkout)
    (checkout / "services/__init__.py").write_text("VALUE = 2\n")
    folder = keep_copy(sources, tmp_path)
    assert (folder.parent, folder.name) == (copies(tmp_path), sources.version)
    assert read_sources(folder).version == sources.version
    (checkout / "rag/two.py").unlink()
    assert keep_copy(sources, tmp_path) == folder
    assert read_sources(folder).files == sources.files
    assert [path.name for path in copies(tmp_path).iterdir()] == [sources.version]


def test_a_copy_has_the_bytecode_of_its_text_and_no_other(checkout: Path, tmp_path: Path) -> None:
    """Python takes bytecode by size and time of change: that of an edit meanwhile would be taken for the old text's."""
    module, edited = checkout / "services/__init__.py", checkout / "rag/two.py"
    os.utime(module, (1e9, 1e9))
    sources = read_sources(checkout)
    edited.write_text("# tag/two.py\n")
    for path in (module, edited):
        py_compile.compile(str(path))
    folder = keep_copy(sources, tmp_path)
    look = "import services; print(services.VALUE, services.__file__)"
    done = subprocess.run(
        [sys.executable, "-v", "-c", look],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", str(folder / "services/__init__.py")]
    assert f"code object from '{folder}/services/__pycache__" in done.stderr
    assert not list(folder.glob("rag/__pycache__/*"))


def test_copies_that_nobody_imports_from_are_removed(checkout: Path, tmp_path: Path) -> None:
    first = keep_copy(read_sources(checkout), tmp_path)
    (checkout / "rag/two.py").unlink()
    second = keep_copy(read_sources(checkout), tmp_path)
    (copies(tmp_path) / ".draft.of.a.crash").mkdir()
    remove_other_copies(tmp_path, {second.name})
    assert not first.exists()
    assert list(copies(tmp_path).iterdir()) == [second]
