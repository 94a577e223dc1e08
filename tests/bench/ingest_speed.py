"""How fast documents become searchable, beside the bare embedding engine and LangChain's pipeline, in turn (A B C A B).

All three get the same documents. Tokens are those of the passages that windfarm embeds; the bare engine embeds these
very passages, LangChain cuts its own of the same size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag.parsing import DocumentParser, ParseLimits
from rag.tokens import load_token_spans
from services.api_client import ApiClient
from services.config import AppConfig
from services.passage_writer import cut_into_chunks, embedded_text
from tests.bench.comparison import ROOT, Comparison
from tests.bench.laptop import tell

DOCUMENTS = ROOT / "tests" / "data" / "company-kb" / "gds-way-en"
_POLL_S = 0.2


def measure_ingest(
    client: ApiClient, other: Comparison, config: AppConfig, home: Path, *, rounds: int, num_documents: int
) -> dict[str, Any]:
    files = sorted(DOCUMENTS.rglob("*.md"))[:num_documents]
    texts, num_tokens = passages_of(files, config, home)
    runs: dict[str, list[float]] = {"bare": [], "windfarm": [], "langchain": []}
    for number in range(rounds + 1):
        seconds = {
            "bare": float(other.ask("embed", texts=texts)["seconds"]),
            "windfarm": ingest(client, files, f"round{number}"),
            "langchain": float(other.ask("ingest", files=[str(file) for file in files])["seconds"]),
        }
        tell(f"ingest, round {number}: { ({name: round(each, 2) for name, each in seconds.items()}) }")
        if number:  # the first one warms up
            for name, each in seconds.items():
                runs[name].append(each)
    ratios = {name: [bare / each for bare, each in zip(runs["bare"], runs[name], strict=True)] for name in runs}
    return {
        "files": len(files),
        "passages": len(texts),
        "tokens": num_tokens,
        "rounds": rounds,
        "tokens_per_s": {name: round(num_tokens / statistics.median(each), 1) for name, each in runs.items()},
        "ratio_to_bare": round(statistics.median(ratios["windfarm"]), 3),
        "ratio_to_bare_each": [round(ratio, 3) for ratio in ratios["windfarm"]],
        "langchain_ratio_to_bare": round(statistics.median(ratios["langchain"]), 3),
    }


def passages_of(files: Sequence[Path], config: AppConfig, home: Path) -> tuple[list[str], int]:
    """What windfarm embeds of these files, and how many tokens the passages have."""
    token_spans = load_token_spans(next((home / "models" / "embed").rglob("tokenizer.json")))
    with DocumentParser(ParseLimits()) as parser:
        chunks = [
            chunk
            for file in files
            for chunk in cut_into_chunks(parser.parse_file(file, file.name), token_spans, config.store.ingestion)
        ]
    return [embedded_text(chunk) for chunk in chunks], sum(chunk.num_tokens for chunk in chunks)


def ingest(client: ApiClient, files: Sequence[Path], collection: str) -> float:
    """Seconds from the first upload to the end of the last job."""
    client.create_collection(collection)
    began = time.perf_counter()
    for file in files:
        client.upload(collection, file, str(file.relative_to(DOCUMENTS)).replace("/", "-"), batch=collection)
    while (states := client.jobs(batch=collection, limit=0)["summary"]["states"])["done"] < len(files):
        if states["failed"] or states["cancelled"]:
            raise RuntimeError(f"not every file was taken: {states}")
        time.sleep(_POLL_S)
    return time.perf_counter() - began
