"""The README's code map is the code: every module is in it with what its docstring says, and nothing else."""

from pathlib import Path

from infra.setup import code_map

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_module_says_what_it_does() -> None:
    silent = [
        str(path) for folder in code_map.FOLDERS for path in code_map.modules(folder) if not code_map.summary(path)
    ]
    assert not silent


def test_the_code_map_in_the_readme_is_that_of_the_code() -> None:
    readme = README.read_text(encoding="utf-8")
    written = readme.split(code_map.START)[1].split(code_map.END)[0].strip()
    assert written == code_map.code_map().strip(), "README.md's code map is out of date: run `make map`"
