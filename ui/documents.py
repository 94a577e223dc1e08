"""Collections and documents: create, list, delete, and add files with their progress.

A file goes from the browser to this process and on to windfarm, where a job reads and indexes it; the temporary copy
here is deleted as soon as it was handed over. One file's failure never stops the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, ListFiles

from ui.api_client import ApiClient, ApiError
from ui.chatting import Connect
from ui.notices import warn
from ui.panels import Upload, document_list, upload_list, upload_of

_POLL_INTERVAL_S = 0.3
_PARALLEL_UPLOADS = 2

Handler = Callable[..., Awaitable[Any]]
ReceivedFile = tuple[Path, str]


def file_field(**options: Any) -> Any:
    """Gradio's file field, handing over (temporary path, name in the browser) for each file.

    The instance is changed, not subclassed: Gradio writes a stub file beside every module that subclasses a component.
    """
    field = gr.File(file_count="multiple", **options)
    field.preprocess = _received
    return field


def _received(payload: ListFiles | FileData | None) -> list[ReceivedFile]:
    if payload is None:
        return []
    files = payload.root if isinstance(payload, ListFiles) else [payload]
    return [(Path(file.path), file.orig_name or Path(file.path).name) for file in files]


def make_add_files(connect: Connect) -> Callable[..., AsyncGenerator[tuple[Any, ...]]]:
    async def add_files(
        key: str, files: list[ReceivedFile], target: str | None, chosen: list[str]
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """Values for: upload list, file field, target collection, chosen collections, document list."""
        client = connect(key)
        try:
            collection = await _existing_target(client, target)
            async with aclosing(_ingest(client, collection, files)) as updates:
                async for uploads in updates:
                    yield upload_list(uploads), None, gr.skip(), gr.skip(), gr.skip()
            names = [entry.name for entry in await client.collections()]
            documents = document_list(collection, await client.documents(collection))
        except ApiError as error:
            warn(error.message)
            yield gr.skip(), None, gr.skip(), gr.skip(), gr.skip()
            return
        finally:
            for path, _ in files:
                path.unlink(missing_ok=True)
        now_chosen = [*chosen, collection] if collection not in chosen else chosen
        yield (
            gr.skip(),
            gr.skip(),
            gr.Dropdown(choices=names, value=collection),
            gr.Dropdown(choices=names, value=now_chosen),
            documents,
        )

    return add_files


async def _existing_target(client: ApiClient, target: str | None) -> str:
    """The collection to add to. A newcomer has none: the first file makes one with the person's name."""
    if target:
        return target
    collections = await client.collections()
    if collections:
        return collections[0].name
    name = f"{(await client.me()).name}-documents"
    return (await client.create_collection(name)).name


async def _ingest(client: ApiClient, collection: str, files: list[ReceivedFile]) -> AsyncGenerator[list[Upload]]:
    uploads = [Upload(name) for _, name in files]
    slots = asyncio.Semaphore(_PARALLEL_UPLOADS)

    async def ingest(index: int, path: Path, name: str) -> None:
        try:
            async with slots:
                job = await client.upload(collection, path, name)
            uploads[index] = upload_of(job)
            while not job.is_finished:
                await asyncio.sleep(_POLL_INTERVAL_S)
                job = await client.job(job.id)
                uploads[index] = upload_of(job)
        except ApiError as error:
            uploads[index] = Upload(name, "failed", 1.0, error.message)

    running = {asyncio.create_task(ingest(index, path, name)) for index, (path, name) in enumerate(files)}
    try:
        while running:
            yield list(uploads)
            finished, running = await asyncio.wait(running, timeout=_POLL_INTERVAL_S)
            for task in finished:
                task.result()
        yield list(uploads)
    finally:
        for task in running:
            task.cancel()


def make_watch_jobs(connect: Connect) -> Callable[..., AsyncGenerator[tuple[Any, ...]]]:
    async def watch(key: str, collection: str | None) -> AsyncGenerator[tuple[Any, ...]]:
        """After a reload: follow the files that are still on their way. Values for: upload list, document list."""
        if not key or not collection:
            yield gr.skip(), gr.skip()
            return
        client = connect(key)
        try:
            followed = {job.id for job in await client.jobs(collection) if not job.is_finished}
            while followed:
                jobs = [job for job in await client.jobs(collection) if job.id in followed]
                yield upload_list([upload_of(job) for job in jobs]), gr.skip()
                if all(job.is_finished for job in jobs):
                    break
                await asyncio.sleep(_POLL_INTERVAL_S)
            documents = document_list(collection, await client.documents(collection)) if followed else gr.skip()
            yield gr.skip(), documents
        except ApiError as error:
            warn(error.message)
            yield gr.skip(), gr.skip()

    return watch


def make_create_collection(connect: Connect) -> Handler:
    async def create(key: str, name: str, chosen: list[str]) -> tuple[Any, ...]:
        """Values for: name field, target collection, chosen collections, document list."""
        client = connect(key)
        if not name.strip():
            warn("Give the new collection a name.")
            return (gr.skip(),) * 4
        try:
            created = (await client.create_collection(name.strip())).name
            names = [entry.name for entry in await client.collections()]
        except ApiError as error:
            warn(error.message)
            return (gr.skip(),) * 4
        return (
            "",
            gr.Dropdown(choices=names, value=created),
            gr.Dropdown(choices=names, value=[*chosen, created]),
            document_list(created, []),
        )

    return create


def make_delete_collection(connect: Connect) -> Handler:
    async def delete(key: str, name: str | None, chosen: list[str]) -> tuple[Any, ...]:
        """Values for: target collection, chosen collections, document list."""
        client = connect(key)
        if not name:
            return (gr.skip(),) * 3
        try:
            await client.delete_collection(name)
            names = [entry.name for entry in await client.collections()]
        except ApiError as error:
            warn(error.message)
            return (gr.skip(),) * 3
        left = [collection for collection in chosen if collection != name]
        target = names[0] if names else None
        documents = await documents_or_nothing(client, target)
        return gr.Dropdown(choices=names, value=target), gr.Dropdown(choices=names, value=left), documents

    return delete


def make_show_documents(connect: Connect) -> Handler:
    async def show(key: str, collection: str | None) -> Any:
        return await documents_or_nothing(connect(key), collection)

    return show


def make_delete_document(connect: Connect) -> Handler:
    async def delete(key: str, collection: str | None, event: gr.EventData) -> Any:
        client = connect(key)
        if not collection:
            return gr.skip()
        try:
            await client.delete_document(collection, str(event._data["id"]))
        except ApiError as error:
            warn(error.message)
        return await documents_or_nothing(client, collection)

    return delete


async def documents_or_nothing(client: ApiClient, collection: str | None) -> str:
    if not collection:
        return ""
    try:
        documents = await client.documents(collection)
        refusals = next((each.refusals for each in await client.collections() if each.name == collection), "")
    except ApiError as error:
        warn(error.message)
        return ""
    return document_list(collection, documents, refusals)
