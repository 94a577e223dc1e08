"""The process with the bare embedding engine and LangChain's pipeline, as the measurements talk to it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from services.config import AppConfig
from tests.bench.environments import langchain_python

ROOT = Path(__file__).resolve().parents[2]


class Comparison:
    """Use as a context manager. `described`: backend, threads and name of the model that it runs."""

    def __init__(self, home: Path, config: AppConfig) -> None:
        ingestion = config.store.ingestion
        arguments = {
            "home": str(home),
            "embed": config.embed.model_dump(),
            "chunk_tokens": ingestion.chunk_tokens,
            "overlap_tokens": ingestion.chunk_overlap_tokens,
        }
        command = [str(langchain_python()), "-m", "tests.bench.langchain_pipeline", json.dumps(arguments)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.described = self._read()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """See `langchain_pipeline.answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what} | more) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the comparison has ended; what it printed says why")
        answer: dict[str, Any] = json.loads(line)
        return answer
