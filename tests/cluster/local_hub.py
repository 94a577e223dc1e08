"""A hub on this machine: what `huggingface_hub` asks of one to fetch a checkpoint or a file, over plain HTTP.

One repository, `owner/name`, with a commit for each revision. It serves no large-file storage, and redirects nowhere.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "owner/name"
Files = Mapping[str, bytes]


class LocalHub(ThreadingHTTPServer):
    """`revisions`: the files of each branch or tag. `given`: the paths of the files that somebody has fetched."""

    daemon_threads = True

    def __init__(self, revisions: Mapping[str, Files]) -> None:
        self.revisions = revisions
        self.given: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()  # 40 digits, as a commit of git has them

    def find(self, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a branch, a tag or a commit."""
        for name, files in self.revisions.items():
            if revision in (name, self.commit_of(name)):
                return self.commit_of(name), files
        return None


class _Answer(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        for prefix, give in (
            (f"api/models/{REPOSITORY}/revision/", self._revision),
            (f"api/models/{REPOSITORY}/tree/", self._tree),
            (f"{REPOSITORY}/resolve/", self._file),
        ):
            if path.startswith(prefix):
                revision, _, name = path.removeprefix(prefix).partition("/")
                if (found := self.server.find(revision)) is None:
                    self._send(404, b"", is_head=is_head, **{"X-Error-Code": "RevisionNotFound"})
                else:
                    give(*found, name, is_head=is_head)
                return
        self._send(404, b"", is_head=is_head, **{"X-Error-Code": "RepoNotFound"})

    def _revision(self, commit: str, files: Files, _name: str, *, is_head: bool) -> None:
        facts = {"id": REPOSITORY, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        self._send(200, json.dumps(facts).encode(), is_head=is_head)

    def _tree(self, _commit: str, files: Files, _name: str, *, is_head: bool) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
            for name, content in files.items()
        ]
        self._send(200, json.dumps(entries).encode(), is_head=is_head)

    def _file(self, commit: str, files: Files, name: str, *, is_head: bool) -> None:
        if name not in files:
            self._send(404, b"", is_head=is_head, **{"X-Error-Code": "EntryNotFound"})
            return
        if not is_head:
            self.server.given.append(name)
        headers = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}
        self._send(200, files[name], is_head=is_head, **headers)

    def _send(self, status: int, body: bytes, *, is_head: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def local_hub(revisions: Mapping[str, Files]) -> Iterator[LocalHub]:
    server = LocalHub(revisions)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
