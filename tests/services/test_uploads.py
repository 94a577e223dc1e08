"""Uploaded files go to disk as they come, keep their bytes, and leave nothing behind that nobody took."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.config import PlatformConfig
from services.errors import ApiError
from services.event_stream import ClientGone
from services.uploads import receive_upload
from tests.services.harness import ScriptedEngine, running_endpoint

JOB = {"id": "job_1", "state": "queued"}


def taking(seen: list[tuple[str, str, bytes]]) -> Any:
    """A store that notes what it was given, and takes nothing over."""

    def submit(collection: str, filename: str, path: Path, actor: str) -> dict[str, Any]:
        seen.append((collection, filename, path.read_bytes()))
        return JOB

    return submit


async def upload(running: Any, content: bytes, name: str = "report.pdf", **arguments: Any) -> httpx.Response:
    return await running.http.post(
        "/v1/collections/towers/documents", files={"file": (name, content, "application/pdf")}, **arguments
    )


@pytest.mark.parametrize("size", [0, 1, 65_536, 3_000_001])
async def test_a_file_arrives_byte_for_byte_and_is_not_left_behind(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    seen: list[tuple[str, str, bytes]] = []
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        running.store.answers["submit_document"] = taking(seen)
        answer = await upload(running, content)
    assert (answer.status_code, answer.json()) == (202, {"job": JOB})
    assert seen == [("towers", "report.pdf", content)]
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_with_wait_the_finished_job_is_answered(tmp_path: Path) -> None:
    states = iter(["parsing", "done"])
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        running.store.answers["submit_document"] = taking([])
        running.store.answers["wait_for_job"] = lambda job, actor: {"id": job, "state": next(states)}
        answer = await upload(running, b"x", params={"wait": "true"})
    assert (answer.status_code, answer.json()["job"]["state"]) == (200, "done")


async def test_names_are_handed_on_as_they_came_and_never_used_as_paths(tmp_path: Path) -> None:
    seen: list[tuple[str, str, bytes]] = []
    names = ["../../etc/passwd", "C:\\evil.txt", "Übergröße ½.txt", 'quo"te.txt', "a" * 300]
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        running.store.answers["submit_document"] = taking(seen)
        for name in names:
            assert (await upload(running, b"x", name)).status_code == 202
    assert [name for _, name, _ in seen][:3] == ["../../etc/passwd", "evil.txt", "Übergröße ½.txt"]
    assert {path.name for path in tmp_path.iterdir()} <= {
        "owner.key",
        "uploads",
        "windfarm.db",
        "windfarm.db-shm",
        "windfarm.db-wal",
        "windfarm.db.lock",
    }


async def test_a_file_that_is_too_long_is_refused_and_removed(tmp_path: Path) -> None:
    config = PlatformConfig(max_body_mib=0.1)
    async with running_endpoint(tmp_path, ScriptedEngine(), config=config) as running:
        answer = await upload(running, b"x" * 180_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_long")
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        ({"json": {"file": "x"}}, 415, "unsupported_media_type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 415, "unsupported_media_type"),
        ({"content": b"rubbish", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "invalid_form"),
        (
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf',
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            400,
            "invalid_form",
        ),
        ({"content": b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, None),
        ({"files": {"document": ("a.txt", b"x")}}, 400, "unknown_parameter"),
        ({"files": [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))]}, 400, "too_many_files"),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"note": "x"}}, 400, "unknown_parameter"),
    ],
)
async def test_forms_that_are_not_one_file_are_refused(
    tmp_path: Path, arguments: dict[str, Any], status: int, code: str | None
) -> None:
    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        answer = await running.http.post("/v1/collections/towers/documents", **arguments)
        assert not running.store.asked
    assert answer.status_code == status
    assert code in (None, answer.json()["error"]["code"])
    uploads = tmp_path / "uploads"
    assert not uploads.exists() or list(uploads.iterdir()) == []


async def test_a_refusal_of_the_store_reaches_the_client(tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise ApiError(404, "not_found_error", "unknown_collection", "There is no collection named 'towers'.")

    async with running_endpoint(tmp_path, ScriptedEngine()) as running:
        running.store.answers["submit_document"] = refuse
        answer = await upload(running, b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_collection")
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_a_client_that_leaves_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    messages = iter(
        [
            {"type": "http.request", "body": b"--b\r\nContent-Disposition: form-data; ", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(ClientGone):
        async with receive_upload(receive, "multipart/form-data; boundary=b", tmp_path / "uploads", 1):
            pass
    assert await asyncio.to_thread(lambda: list((tmp_path / "uploads").iterdir())) == []


_ON_A_SMALL_DISK = """
import asyncio, sys
from pathlib import Path
from services.errors import ApiError
from services.uploads import receive_upload

async def main(folder):
    head = b'--b\\r\\nContent-Disposition: form-data; name="file"; filename="a"\\r\\n\\r\\n'
    form = head + b'x' * 4_000_000 + b'\\r\\n--b--'
    async def receive():
        return {"type": "http.request", "body": form}
    try:
        async with receive_upload(receive, "multipart/form-data; boundary=b", folder / "uploads", 64):
            print("it fitted")
    except ApiError as error:
        print(error.status, error.code, error.message)
    print("left:", sum(1 for path in folder.rglob("*") if path.is_file()))

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.requires("tmpfs")
@pytest.mark.parametrize(
    ("options", "cause"), [("size=1m", "the disk is full"), ("size=1m,ro", "Read-only file system")]
)
def test_a_full_or_read_only_disk_is_explained_and_nothing_is_left(tmp_path: Path, options: str, cause: str) -> None:
    script = 'mount -t tmpfs -o "$1" none "$2" && exec "$3" -c "$4" "$2"'
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", options, str(tmp_path), sys.executable, _ON_A_SMALL_DISK],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    said, left = answer.stdout.splitlines()
    assert said.startswith(f"507 storage_unavailable The file cannot be kept: {cause}")
    assert left == "left: 0"
