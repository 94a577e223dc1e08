"""The speed half of `make bench-retrieval`, alone: search in large collections, ingest, memory. The last line is one
JSON object.

    ARGS    see --help; the defaults are what the product promises something for

Passages of the large collections are mixed from the sentences of the question sets; their vectors are synthetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rag.judged_set import read_judged_set
from services.api_client import ApiClient
from services.ray_config import load_ray_config
from tests.bench.comparison import ROOT, Comparison
from tests.bench.ingest_speed import measure_ingest
from tests.bench.laptop import free_port, run_python, tell
from tests.bench.large_collection import Content, Model, make_passages, read_sentences
from tests.bench.search_speed import WARM_UP, Large, Searcher, compare_search, memory_mib, summary

SETS = [ROOT / "tests" / "data" / "multilingual-qa-mini" / language for language in ("en", "de", "es", "fr", "it")]
_NUM_REAL = 48
"""Beginnings of passages whose vectors are real, to make the others from."""


@dataclass(frozen=True)
class ScaleOptions:
    """`passages`: of the large collection; `compared`: of the one that LangChain searches too; 0 leaves a part out."""

    passages: int = 100_000
    compared: int = 20_000
    rounds: int = 3
    documents: int = 20
    queries: int = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    print(json.dumps(measure_scale(SETS, options_of(parser.parse_args()))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ScaleOptions()
    parser.add_argument("--passages", type=int, default=default.passages, help="of the large collection; 0: none")
    parser.add_argument("--compared", type=int, default=default.compared, help="of that which LangChain has; 0: none")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="of ingest; 0: none")
    parser.add_argument("--documents", type=int, default=default.documents, help="that are ingested in a round")
    parser.add_argument("--queries", type=int, default=default.queries, help="searches in each collection")


def options_of(arguments: argparse.Namespace) -> ScaleOptions:
    return ScaleOptions(**{field.name: getattr(arguments, field.name) for field in fields(ScaleOptions)})


def measure_scale(sets: Sequence[Path], options: ScaleOptions) -> dict[str, Any]:
    """Empty, and nothing is started, where all parts are left out."""
    if not (options.rounds or options.compared or options.passages):
        return {}
    config = load_ray_config(ROOT / "ray_config.yaml").app
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as temporary:
        folder, home = Path(temporary), Path(temporary, "home")
        run_python(["-m", "cluster.weights", "prepare", "--home", str(home)])
        with (
            running_windfarm(home) as up,
            ApiClient(up["api"], up["key"]) as client,
            Comparison(home, config) as other,
        ):
            result: dict[str, Any] = {"cpus": psutil.cpu_count(), "embedding": other.described}
            if options.rounds:
                rounds, documents = options.rounds, options.documents
                result["ingest"] = measure_ingest(client, other, config, home, rounds=rounds, num_documents=documents)
                tell(f"ingest: {result['ingest']}")
            return result | _measure_search(sets, options, up["api"], client, other, folder, home)


@contextmanager
def running_windfarm(home: Path) -> Iterator[dict[str, str]]:
    """What `windfarm up` printed, with the default configuration."""
    windfarm = ROOT / ".venv" / "bin" / "windfarm"
    try:
        command = [windfarm, "up", "--detach", "--json", "--home", home, "--port", str(free_port())]
        up = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        yield json.loads(up.stdout.splitlines()[-1])
    finally:
        subprocess.run([windfarm, "down", "--home", home], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _measure_search(
    sets: Sequence[Path],
    options: ScaleOptions,
    api: str,
    client: ApiClient,
    other: Comparison,
    folder: Path,
    home: Path,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    model, content = _model(client), _real_content(sets, other, folder)
    queries = _queries(sets, options.queries + WARM_UP)
    searcher = Searcher(client, api, home)
    before = memory_mib(home)
    if options.compared:
        large = _make("compared", content, options.compared)
        searcher.fill(large, model, folder)
        result["search_compared"] = compare_search(searcher, other, large, queries, folder)
        tell(f"search beside LangChain: {result['search_compared']}")
        client.delete_collection(large.name)
    if options.passages:
        large = _make("large", content, options.passages)
        seconds = searcher.fill(large, model, folder)
        result["search"] = summary(searcher.search(large.name, queries)) | {"passages": options.passages}
        result["memory_mib"] = {"passages": options.passages, "before": before, "after": memory_mib(home)}
        result["import_s"] = seconds
        tell(f"search: {result['search']}, imported in {seconds} s, memory: {result['memory_mib']}")
    return result


def _make(name: str, content: Content, num_passages: int) -> Large:
    texts, vectors = make_passages(content, num_passages)
    return Large(name, texts, vectors, sorted(content.sentences))


def _model(client: ApiClient) -> Model:
    """What runs, as a collection remembers it."""
    client.create_collection("probe")
    made = next(each for each in client.collections() if each["name"] == "probe")
    return Model(made["embedding_model"], made["embedding_dimension"])


def _real_content(sets: Sequence[Path], other: Comparison, folder: Path) -> Content:
    texts = [document.text[:400] for each in sets for document in read_judged_set(each).documents if document.text]
    into = folder / "real.npy"
    other.ask("vectors", texts=texts[:: max(1, len(texts) // _NUM_REAL)], into=str(into))
    return Content(read_sentences(sets), np.load(into))


def _queries(sets: Sequence[Path], wanted: int) -> list[str]:
    """As many of each language, in turn."""
    texts = [[query.text for query in read_judged_set(each).queries] for each in sets]
    mixed = [text for same_place in zip(*texts, strict=False) for text in same_place]
    return mixed[:wanted]


if __name__ == "__main__":
    main()
