"""Fills and empties a small disk under a running ingestion and under a chat, and asserts what people hear and what is
left. The last line that it prints has the seconds of each refusal, and of what was served first with room again.

Run as root in a mount namespace of its own; the disk is mounted at the folder given."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

from services.errors import ApiError
from tests.services.harness import ScriptedEngine, error_of, running_endpoint, wait_until, words
from tests.services.ingesting import OWNER, Running, running

SIZE = "192m"
seconds: list[float] = []


def text(number: int) -> str:
    return "\n\n".join(f"Rule {n} of file {number} says something." for n in range(400))


async def main(home: Path) -> None:
    async with running(home) as windfarm:
        windfarm.create()
        assert (await windfarm.ingest("handbook", "first.md", text(1)))["state"] == "done"
        await _full(windfarm, home)
        await _read_only(windfarm, home)
    async with running(home) as windfarm:
        names = {document["name"] for document in windfarm.knowledge.list_documents("handbook", OWNER)}
        assert {"first.md", "after.md"} <= names, names
        windfarm.check_agreement()
    await _chat_on_full(home)


async def _full(windfarm: Running, home: Path) -> None:
    filler = home / "filler"
    for spare in (300_000, 60_000, 0):
        _fill(filler, spare)
        for number in range(2, 5):
            code = await _try(windfarm, f"file{number}.md", text(number))
            assert code in (None, "disk_full"), code
        assert windfarm.found("handbook", "rule 399 of file 1"), "what was there is still found"
        filler.unlink()
    started = time.monotonic()
    assert await _try(windfarm, "after.md", text(5)) is None, "with space again, it works again"
    seconds.append(time.monotonic() - started)


async def _read_only(windfarm: Running, home: Path) -> None:
    # A read-only view over the folder, because a disk with open files cannot become read-only.
    _mount("--bind", str(home), str(home))
    _mount("-o", "remount,bind,ro", str(home))
    assert windfarm.found("handbook", "rule 399 of file 1")
    assert await _try(windfarm, "readonly.md", text(6)) == "read_only"
    _command("umount", str(home))


async def _chat_on_full(home: Path) -> None:
    """Messages are long here, since short ones may find room in files that the database has already."""
    filler, long = home / "filler", "word " * 100_000
    may_answer = asyncio.Event()
    may_answer.set()
    engine = ScriptedEngine(may_answer, *words(long))
    (home / "chats").mkdir()
    async with running_endpoint(home / "chats", engine) as endpoint:
        conversation = (await endpoint.http.post("/v1/conversations", json={})).json()["id"]

        async def ask(text: str) -> str | None:
            """The code of what went wrong, if anything."""
            started = time.monotonic()
            answer = await endpoint.chat(conversation=conversation, messages=[{"role": "user", "content": text}])
            if answer.status_code != 503:
                return None
            seconds.append(time.monotonic() - started)
            return str(error_of(answer)["code"])

        async def kept() -> list[str]:
            found = await endpoint.http.get(f"/v1/conversations/{conversation}")
            return [message["content"] for message in found.json()["messages"]]

        assert await ask("Before?") is None
        may_answer.clear()
        asked = asyncio.create_task(ask("While it is filled?"))
        await wait_until(lambda: len(engine.requests) == 2)
        _fill(filler, 0)
        may_answer.set()
        assert await asked == "database_unavailable"
        assert await ask(long) == "database_unavailable"
        assert len(engine.requests) == 2, "the model was asked although the question could not be kept"
        assert await kept() == ["Before?", long, "While it is filled?"]
        filler.unlink()
        assert await ask("After?") is None
        assert await kept() == ["Before?", long, "While it is filled?", "After?", long]


async def _try(windfarm: Running, name: str, content: str) -> str | None:
    """The code of what went wrong, if anything."""
    started = time.monotonic()
    try:
        job = await windfarm.ingest("handbook", name, content)
    except ApiError as error:
        code = error.code
    else:
        assert job["state"] in ("done", "failed"), job
        code = job["error"]["code"] if job["error"] else None
    if code is not None:
        seconds.append(time.monotonic() - started)
    return code


def _fill(filler: Path, spare: int) -> None:
    """Take all space but about `spare` bytes."""
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
        size = file.tell()
        file.truncate(max(0, size - spare))


def _mount(*arguments: str) -> None:
    _command("mount", *arguments)


def _command(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    _mount("-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder))
    asyncio.run(main(folder))
    print(json.dumps({"seconds": seconds}))
