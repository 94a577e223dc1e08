"""The public HTTP API as the command line uses it: one method for each thing that a command does.

Knows address, key and the stream format; prints nothing. Every failure is an `ApiFailed` with a sentence for a person.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

TIMEOUT = httpx.Timeout(30, read=600)


class ApiFailed(Exception):
    """A request failed. `status` is 0 when there was no answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ApiClient:
    """Use as a context manager."""

    def __init__(self, api: str, key: str) -> None:
        self._http = httpx.Client(
            base_url=api.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            trust_env=False,
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/v1/models")["data"]
        return found

    def default_model(self) -> str:
        """The model that is used when nobody names one: the first chat model that the endpoint lists."""
        for model in self.models():
            if model.get("kind", "chat") == "chat":
                return str(model["id"])
        raise ApiFailed(503, "no_model", "No chat model is ready. `windfarm status` says what is pending.")

    def chat(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed answer; raises `ApiFailed` also when the stream itself reports an error or breaks."""
        is_complete = False
        try:
            with self._http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    raise _failure(response)
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        is_complete = True
                    elif line.startswith("data: "):
                        yield _chunk(line)
        except httpx.TransportError as error:
            raise _no_answer(error) from error
        if not is_complete:
            raise ApiFailed(0, "stream_broken", "The answer broke off: the connection to windfarm was lost.")

    def collections(self) -> list[dict[str, Any]]:
        return _items(self._call("GET", "/v1/collections"))

    def create_collection(self, name: str) -> None:
        """Make a collection; one that is there already stays as it is."""
        try:
            self._call("POST", "/v1/collections", json={"name": name})
        except ApiFailed as error:
            if error.status != 409:
                raise

    def delete_collection(self, name: str) -> None:
        self._call("DELETE", f"/v1/collections/{quote(name, safe='')}")

    def documents(self, collection: str) -> list[dict[str, Any]]:
        return _items(self._call("GET", f"/v1/collections/{quote(collection, safe='')}/documents"))

    def delete_document(self, collection: str, document_id: str) -> None:
        self._call("DELETE", f"/v1/collections/{quote(collection, safe='')}/documents/{quote(document_id, safe='')}")

    def upload(self, collection: str, content: Path | bytes, name: str, **about: str | None) -> dict[str, Any]:
        """Send one file; returns its job. `about`: batch, source and origin of the file."""
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            job: dict[str, Any] = self._call(
                "POST",
                f"/v1/collections/{quote(collection, safe='')}/documents",
                files={"file": (name, file)},
                params={key: value for key, value in about.items() if value is not None},
            )["job"]
        return job

    def add_url(self, collection: str, url: str, batch: str | None = None) -> dict[str, Any]:
        """Let windfarm fetch a URL; returns its job."""
        body = {"url": url, "batch": batch}
        path = f"/v1/collections/{quote(collection, safe='')}/urls"
        job: dict[str, Any] = self._call("POST", path, json=body)["job"]
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self._call("GET", f"/v1/jobs/{quote(job_id, safe='')}")
        job: dict[str, Any] = answer.get("job", answer)
        return job

    def jobs(self, **chosen: str | int | None) -> dict[str, Any]:
        """The newest jobs (`data`) and a summary of all (`summary`); see the route for what may be chosen."""
        return self._call(
            "GET", "/v1/jobs", params={name: value for name, value in chosen.items() if value is not None}
        )

    def change_job(self, job_id: str, action: str) -> dict[str, Any]:
        """`pause`, `resume` or `cancel`."""
        return self._call("POST", f"/v1/jobs/{quote(job_id, safe='')}/{action}")

    def change_jobs(self, collection: str, action: str, batch: str | None = None) -> int:
        """The same for all unfinished jobs of a collection, or of one batch; returns how many there were."""
        path = f"/v1/collections/{quote(collection, safe='')}/jobs/{action}"
        return int(self._call("POST", path, params={"batch": batch} if batch else None)["num_jobs"])

    def experts(self, model: str) -> dict[str, Any]:
        """Counts of a model's experts; see the route for the fields."""
        return self._call("GET", "/v1/cluster/experts", params={"model": model})

    def expert_models(self) -> list[dict[str, Any]]:
        """The same of every model; those without experts say so in `reason`."""
        return _items(self._call("GET", "/v1/cluster/experts"))

    def search(self, collection: str, query: str, top_k: int) -> list[dict[str, Any]]:
        body = {"query": query, "top_k": top_k}
        path = f"/v1/collections/{quote(collection, safe='')}/search"
        found: list[dict[str, Any]] = self._call("POST", path, json=body)["passages"]
        return found

    def document(self, collection: str, document_id: str) -> dict[str, Any]:
        """Metadata, text and pages."""
        return self._call(
            "GET", f"/v1/collections/{quote(collection, safe='')}/documents/{quote(document_id, safe='')}"
        )

    def feedback(self, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Everybody's, the newest first; for owners."""
        after: dict[str, str] = {}
        while True:
            wanted = {"all": "true", "limit": "500"} | ({"state": state} if state else {}) | after
            answer = self._call("GET", "/v1/feedback", params=wanted)
            yield from answer["data"]
            if not answer["has_more"]:
                return
            after = {"after": answer["data"][-1]["id"]}

    def review_feedback(self, feedback_id: str, decision: str, relevant: list[str]) -> dict[str, Any]:
        body = {"decision": decision} | ({"relevant": relevant} if relevant else {})
        return self._call("POST", f"/v1/feedback/{quote(feedback_id, safe='')}/review", json=body)

    def download(self, path: str, target: Path, **query: str) -> int:
        """A file of the server, written beside `target` and renamed when it is whole. Returns its size."""
        part = target.with_name(f"{target.name}.part")
        try:
            with self._http.stream("GET", path, params=query, timeout=None) as response:
                if response.status_code != 200:
                    response.read()
                    raise _failure(response)
                with part.open("wb") as file:
                    for block in response.iter_bytes(1 << 20):
                        file.write(block)
            part.replace(target)
        except httpx.TransportError as error:
            raise _no_answer(error) from error
        finally:
            part.unlink(missing_ok=True)
        return target.stat().st_size

    def send_file(self, path: str, source: Path) -> dict[str, Any]:
        """A file as the body of a request, as it is read."""
        headers = {"content-type": "application/octet-stream", "content-length": str(source.stat().st_size)}
        with source.open("rb") as file:
            blocks = iter(lambda: file.read(1 << 20), b"")
            return self._call("POST", path, content=blocks, headers=headers, timeout=None)

    def reembed(self, collection: str) -> dict[str, Any]:
        return self._call("POST", f"/v1/collections/{quote(collection, safe='')}/reembed")

    def tune(self, collection: str, questions: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The collection as it is now, with its `tuning`."""
        body = {} if questions is None else {"questions": questions}
        return self._call("POST", f"/v1/collections/{quote(collection, safe='')}/tune", json=body)

    def forget_tuning(self, collection: str) -> dict[str, Any]:
        return self._call("DELETE", f"/v1/collections/{quote(collection, safe='')}/tune")

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Any route of the API, for commands that need no more than it."""
        return self._call(method, path) if body is None else self._call(method, path, json=body)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise _no_answer(error) from error
        if response.status_code >= 400:
            raise _failure(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer


def _items(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name in ("data", "collections", "documents"):
        if name in answer:
            return list(answer[name])
    raise ApiFailed(200, "bad_answer", f"The endpoint answered without a list: {json.dumps(answer)[:200]}")


def _chunk(line: str) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if error := chunk.get("error"):
        raise ApiFailed(200, str(error.get("code")), str(error.get("message")))
    return chunk


def _failure(response: httpx.Response) -> ApiFailed:
    try:
        error = response.json()["error"]
        return ApiFailed(response.status_code, str(error.get("code")), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return ApiFailed(response.status_code, "http_error", f"HTTP {response.status_code}: {response.text[:300]}")


def _no_answer(error: httpx.TransportError) -> ApiFailed:
    where = f" at {error.request.url.copy_with(path='/', query=None)}" if error.request else ""
    return ApiFailed(0, "no_answer", f"windfarm does not answer{where} ({error}). Start it with `windfarm up`.")
