"""The page: `build_ui` wires its components, `create_app` serves it. A thin client: all it does goes over HTTP to the
address that it is given, with the key of the person who uses it. Nothing is shared between people or tabs.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import httpx
from fastapi import FastAPI

from ui import look
from ui.api_client import ApiClient, open_http
from ui.chatting import Connect, make_ask, make_retry, make_show_stopped
from ui.conversations import fresh, make_delete, make_open, make_refresh, make_rename
from ui.documents import (
    make_add_files,
    make_create_collection,
    make_delete_collection,
    make_delete_document,
    make_show_documents,
    make_watch_jobs,
)
from ui.feedback import make_rate
from ui.guard import Guard
from ui.layout import Page, build_page
from ui.signing_in import View, make_come_back, make_sign_in, signed_out
from ui.sources import make_show_source

# Temporary copies of uploads that a crash left behind are deleted after an hour.
_DELETE_CACHE = (600, 3600)
# Generations wait on the network; the models' own queues decide how many run.
_MAX_EVENTS = 256
_LOOK_FOR_EVENTS_EVERY_S = 0.05
# Nothing here reports progress through Gradio, which looks a hundred times a second for some.
_LOOK_FOR_PROGRESS_EVERY_S = 10.0


def create_app(api_url: str, *, max_file_mib: float = 64) -> FastAPI:
    """An ASGI application that serves the page at `/` for the windfarm at `api_url`."""
    http = open_http(api_url)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app,
        build_ui(api_url, http),
        path="/",
        theme=look.theme(),
        head=look.head(),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=int(max_file_mib * 2**20),
    )
    app.add_middleware(Guard, http=http)
    return app


def build_ui(api_url: str, http: httpx.AsyncClient | None = None) -> gr.Blocks:
    """The page as Gradio blocks. Its look comes from `create_app`, which mounts it."""
    connections = http or open_http(api_url)

    def connect(key: str) -> ApiClient:
        return ApiClient(connections, key)

    with gr.Blocks(
        title="windfarm", analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=_DELETE_CACHE
    ) as blocks:
        page = build_page()
        _wire_account(blocks, page, connect)
        _wire_chat(page, connect)
        _wire_conversations(page, connect)
        _wire_documents(page, connect)
    blocks.queue(default_concurrency_limit=_MAX_EVENTS, api_open=False)
    _calm_down(blocks)
    return blocks


def _calm_down(blocks: gr.Blocks) -> None:
    """Gradio looks for new events a thousand times a second, 6 % of a core while nobody uses the page. Has to come
    after `queue`, which makes a new one."""
    blocks._queue.sleep_when_free = _LOOK_FOR_EVENTS_EVERY_S
    blocks._queue.progress_update_sleep_when_free = _LOOK_FOR_PROGRESS_EVERY_S


# Options of all events: no endpoint for scripts (they have the API), no spinner over the components.
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def _wire_account(blocks: gr.Blocks, page: Page, connect: Connect) -> None:
    view = [getattr(page, name) for name in View.__slots__]
    here = "(key, _) => [key, windfarm.conversationInAddress()]"
    returned = blocks.load(make_come_back(connect), [page.key, page.conversation_id], view, js=here, **_QUIET)
    returned.then(make_watch_jobs(connect), [page.key, page.target], [page.uploads, page.documents], **_QUIET)
    sign_in = {"fn": make_sign_in(connect), "inputs": [page.key_box, page.conversation_id], "outputs": view, "js": here}
    page.sign_in_button.click(**sign_in, **_QUIET)
    page.key_box.submit(**sign_in, **_QUIET)
    page.account.leave(lambda: signed_out().outputs(), None, view, **_QUIET)
    page.key.change(None, page.key, None, js="(key) => windfarm.setKey(key)", **_QUIET)
    page.conversation_id.change(
        None, page.conversation_id, None, js="(id) => windfarm.conversationToAddress(id)", **_QUIET
    )


def _wire_chat(page: Page, connect: Connect) -> None:
    answer = [page.chat, page.question, page.conversation_id, page.sources]
    options = [page.model, page.collections, page.has_tools]
    refresh = {
        "fn": make_refresh(connect),
        "inputs": [page.key, page.conversation_id],
        "outputs": page.conversations,
        **_QUIET,
    }
    ask = make_ask(connect)
    asking = page.question.submit(ask, [page.key, page.conversation_id, page.question, *options], answer, **_QUIET)
    example = page.chat.example_select(_text_of_example, None, page.question, **_QUIET)
    asking_example = example.then(ask, [page.key, page.conversation_id, page.question, *options], answer, **_QUIET)
    retrying = page.chat.retry(make_retry(connect), [page.key, page.conversation_id, *options], answer, **_QUIET)
    for event in (asking, asking_example, retrying):
        event.then(**refresh)
    stopping = page.question.stop(None, None, None, cancels=[asking, asking_example, retrying], **_QUIET)
    stopped = stopping.then(make_show_stopped(connect), [page.key, page.conversation_id, page.chat], answer, **_QUIET)
    stopped.then(**refresh)
    page.chat.like(make_rate(connect), [page.key, page.conversation_id], None, **_QUIET)
    page.sources.cite(make_show_source(connect), [page.key, page.conversation_id], page.sources, **_QUIET)


def _wire_conversations(page: Page, connect: Connect) -> None:
    chat = [page.chat, page.question, page.conversation_id, page.sources]
    who = [page.key, page.conversation_id]
    started = page.new_chat.click(fresh, None, chat, js="() => windfarm.closeOnPhone()", **_QUIET)
    started.then(make_refresh(connect), who, page.conversations, **_QUIET)
    page.conversations.open(
        make_open(connect), page.key, [*chat, page.conversations, page.model, page.collections], **_QUIET
    )
    page.conversations.rename(make_rename(connect), who, page.conversations, **_QUIET)
    page.conversations.delete(make_delete(connect), who, [*chat, page.conversations], **_QUIET)


def _wire_documents(page: Page, connect: Connect) -> None:
    page.files.upload(
        make_add_files(connect),
        [page.key, page.files, page.target, page.collections],
        [page.uploads, page.files, page.target, page.collections, page.documents],
        **_QUIET,
    )
    page.target.input(make_show_documents(connect), [page.key, page.target], page.documents, **_QUIET)
    create = {
        "fn": make_create_collection(connect),
        "inputs": [page.key, page.new_name, page.collections],
        "outputs": [page.new_name, page.target, page.collections, page.documents],
    }
    page.create.click(**create, **_QUIET)
    page.new_name.submit(**create, **_QUIET)
    page.delete_collection.click(
        make_delete_collection(connect),
        [page.key, page.target, page.collections],
        [page.target, page.collections, page.documents],
        js="(...values) => windfarm.confirmed('Delete this collection with all its documents?', values)",
        **_QUIET,
    )
    page.documents.delete(make_delete_document(connect), [page.key, page.target], page.documents, **_QUIET)


def _text_of_example(event: gr.SelectData) -> str:
    return str(event.value["text"])
