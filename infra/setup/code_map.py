"""Writes the code map of the README: one line per module, taken from the first sentence of its docstring (`make map`).

A map by hand drifts as modules come and go; this one is checked by a test.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- code map: written by `make map` -->", "<!-- end of code map -->"
FOLDERS = {
    "cluster": "where models run: catalogue, weights, engines. No HTTP, no retrieval",
    "services": "what Ray Serve runs, the command line, the database. The only folder with deployments",
    "rag": "text in, passages out. No Ray, no HTTP",
    "ui": "the page. Talks HTTP, imports nothing of the others",
    "infra/setup": "what `make` runs before there is an environment",
    "infra/kuberay": "checks of the Kubernetes manifests, without a cluster",
}


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n{code_map()}{END}{after}", encoding="utf-8")


def code_map() -> str:
    return "\n".join(folder_map(folder, what) for folder, what in FOLDERS.items())


def folder_map(folder: str, what: str) -> str:
    lines = [f"**`{folder}/`** {what}", "", "| file | what it does |", "|---|---|"]
    lines += [f"| `{path.relative_to(ROOT / folder)}` | {summary(path)} |" for path in modules(folder)]
    return "\n".join(lines) + "\n"


def modules(folder: str) -> list[Path]:
    """All modules but the steps of the database schema and packages that say nothing."""
    paths = sorted((ROOT / folder).rglob("*.py"), key=lambda path: (len(path.relative_to(ROOT).parts) > 2, path))
    return [path for path in paths if "versions" not in path.parts and (path.name != "__init__.py" or summary(path))]


def summary(path: Path) -> str:
    """First sentence of the docstring, as one cell of a table."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z`(])", text)[0]
    return sentence.rstrip(".:").replace("|", "\\|")


if __name__ == "__main__":
    main()
