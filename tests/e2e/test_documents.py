"""`windfarm ingest` of a folder with real files of every type: each ends as its manifest says, none stops another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.product import ROOT, Product

pytestmark = pytest.mark.e2e

DOCUMENTS = ROOT / "tests" / "data" / "documents"
MANIFEST = [json.loads(line) for line in (DOCUMENTS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
MAX_BYTES = 100_000
ENDS = {"text": "added", "text-or-empty": "added", "empty": "failed", "reject": "failed"}


def chosen() -> list[dict[str, Any]]:
    """The smallest file of each type and all that are not plainly text, as far as vectors for them take no minutes; an
    embedder without a model takes all of them, in `tests/services/test_ingestion_folder.py`."""
    smallest: dict[str, dict[str, Any]] = {}
    for entry in sorted(MANIFEST, key=lambda entry: -entry["bytes"]):
        if entry["expect"] == "text" and entry["bytes"] < MAX_BYTES:
            smallest[Path(entry["file"]).suffix] = entry
    return [*smallest.values(), *(entry for entry in MANIFEST if entry["expect"] != "text")]


def test_every_kind_of_file_ends_as_its_manifest_says_and_is_told_when_it_ends(
    product: Product, tmp_path: Path
) -> None:
    entries = {entry["file"]: entry for entry in chosen()}
    for name in entries:
        shutil.copy(DOCUMENTS / name, tmp_path)
    answer = product.run("ingest", str(tmp_path), "--collection", "all-kinds", "--json", check=False)
    documents = json.loads(product.run("documents", "all-kinds", "--json").stdout)["documents"]
    product.run("collections", "--delete", "all-kinds")
    assert answer.returncode == 1, answer.stderr
    ended = {file["path"]: file for file in json.loads(answer.stdout)["files"]}
    assert ended.keys() == entries.keys()
    wanted = {name: ENDS[entry["expect"]] for name, entry in entries.items()}
    assert {name: file["state"] for name, file in ended.items()} == wanted, answer.stderr
    for name, entry in entries.items():
        if "encrypted" in entry["note"]:
            assert "is encrypted" in ended[name]["reason"]
    assert {document["name"] for document in documents} == {name for name, end in wanted.items() if end == "added"}
    # Where nobody looks at bars, progress is one line for each file, in their order.
    told = [line.split(maxsplit=1) for line in answer.stderr.splitlines() if line.startswith(("added ", "failed "))]
    assert [(state, name.split(": ")[0]) for state, name in told] == [(wanted[name], name) for name in ended]
