"""The code map of the README names every module, and no module that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "services", "rag", "ui", "infra/setup")
START, END = "## Code map", "\n## "


def mapped_files() -> set[str]:
    """Paths that the code map names: lines "folder/" begin a folder, lines "  file.py" belong to it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert START in readme, f"README.md has no section {START!r}"
    section = readme.split(START, 1)[1].split(END, 1)[0]
    files, folder = set(), ""
    for line in section.splitlines():
        if match := re.match(r"([\w/]+)/(\s|$)", line):
            folder = match[1]
        elif match := re.match(r"\s+([\w/]+\.\w+)\s{2,}\S", line):
            files.add(f"{folder}/{match[1]}")
    return files


def real_files() -> set[str]:
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.name != "__init__.py" and "versions" not in path.parts and "__pycache__" not in path.parts
    }


def test_every_module_is_named_in_the_code_map() -> None:
    missing = real_files() - mapped_files()
    assert not missing, f"not in README.md's code map: {', '.join(sorted(missing))}"


def test_the_code_map_names_no_module_that_is_gone() -> None:
    gone = {name for name in mapped_files() if not (ROOT / name).exists()}
    assert not gone, f"README.md's code map names files that do not exist: {', '.join(sorted(gone))}"
