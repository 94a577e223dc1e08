"""How long searches take in large collections, through the public endpoint, and what such a collection takes.

Who searches is a member of three groups who owns nothing, so every search carries the filter of groups and readers.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from rag.types import Vectors
from services.api_client import ApiClient
from tests.bench.comparison import Comparison
from tests.bench.large_collection import Model, write_export

_TOP_K = 10
WARM_UP = 20
_NUM_GROUPS = 20
_QUIET_S, _QUIET_SHARE = 3.0, 0.05
_MIB = 1 << 20


@dataclass(frozen=True)
class Large:
    """A collection's content; the texts of a document have one of the languages."""

    name: str
    texts: list[str]
    vectors: Vectors
    languages: Sequence[str]


class Searcher:
    """A member who searches, and the owner who fills collections for them."""

    def __init__(self, owner: ApiClient, api: str, home: Path) -> None:
        self._owner, self._home = owner, home
        self._groups = [owner.request("POST", "/v1/groups", {"name": f"g{n}"})["id"] for n in range(_NUM_GROUPS)]
        user = owner.request("POST", "/v1/users", {"name": "reader"})["id"]
        for group in self._groups[:3]:
            owner.request("PUT", f"/v1/groups/{group}/members/{user}")
        key = owner.request("POST", f"/v1/users/{user}/keys", {"name": "bench"})["key"]
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=api, headers=headers, timeout=60, trust_env=False)

    def fill(self, large: Large, model: Model, folder: Path) -> float:
        """Import the collection. Returns the seconds until windfarm was quiet again."""
        export = folder / f"{large.name}.kb"
        write_export(export, large.name, large.texts, large.vectors, model, large.languages, self._groups)
        began = time.perf_counter()
        self._owner.send_file("/v1/kb/import", export)
        export.unlink()
        return round(wait_until_quiet(self._home) - began, 1)

    def search(self, collection: str, queries: Sequence[str]) -> list[float]:
        """Milliseconds of each question but the first ones."""
        took = []
        for query in queries:
            began = time.perf_counter()
            answer = self._http.post(f"/collections/{collection}/search", json={"query": query, "top_k": _TOP_K})
            took.append(1000 * (time.perf_counter() - began))
            answer.raise_for_status()
            found = len(answer.json()["passages"])
            assert found == _TOP_K, f"{found} of {_TOP_K} passages, though there are enough that may be read"
        return took[WARM_UP:]


def compare_search(
    searcher: Searcher, other: Comparison, large: Large, queries: Sequence[str], folder: Path
) -> dict[str, Any]:
    """LangChain's pipeline searches as it comes: by meaning alone, without a filter, in its own process."""
    texts, vectors = folder / "texts.json", folder / "vectors.npy"
    texts.write_text(json.dumps(large.texts), "utf-8")
    np.save(vectors, large.vectors)
    other.ask("load", texts=str(texts), vectors=str(vectors))
    theirs: list[float] = other.ask("search", queries=list(queries), top_k=_TOP_K)["milliseconds"]
    ours = searcher.search(large.name, queries)
    return {
        "passages": len(large.texts),
        "windfarm": summary(ours),
        "langchain": summary(theirs[WARM_UP:]),
    }


def summary(milliseconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(milliseconds, n=20, method="inclusive")
    return {
        "searches": len(milliseconds),
        "p50_ms": round(statistics.median(milliseconds), 1),
        "p95_ms": round(cuts[-1], 1),
        "max_ms": round(max(milliseconds), 1),
    }


def replica(home: Path, name: str) -> psutil.Process:
    """The process of a deployment, such as `store:Store`."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        named = f"ServeReplica:{name}" in " ".join(process.info["cmdline"] or ())
        if named and str(home) in str((process.info["environ"] or {}).get("WINDFARM_HOME")):
            return process
    raise RuntimeError(f"the process of {name} was not found")


def wait_until_quiet(home: Path) -> float:
    """Until the store has merged and indexed what was written. Returns since when it has been quiet."""
    store = replica(home, "store:Store")
    while True:
        began, before = time.perf_counter(), _cpu_s(store)
        was_merging = _is_merging(store)
        time.sleep(_QUIET_S)
        if not was_merging and not _is_merging(store) and _cpu_s(store) - before < _QUIET_SHARE * _QUIET_S:
            return began


def memory_mib(home: Path) -> dict[str, float]:
    """Of the store's process and on the disk. `resident` holds pages of files that the kernel may take back."""
    info = replica(home, "store:Store").memory_full_info()
    files = [path.stat() for path in (home / "qdrant").rglob("*") if path.is_file()]
    return {
        "resident": round(info.rss / _MIB, 1),
        "own": round(info.uss / _MIB, 1),
        "disk": round(sum(512 * each.st_blocks for each in files) / _MIB, 1),
    }


def _is_merging(store: psutil.Process) -> bool:
    """Copying a collection and merging the copy are done by processes of their own."""
    names = []
    for child in store.children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            names.append(" ".join(child.cmdline()))
    return any("vector_store_merger" in name or name.startswith("cp ") for name in names)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
