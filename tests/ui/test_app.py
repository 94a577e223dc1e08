"""The page as an application: it builds, serves itself, loads nothing from elsewhere, imports nothing of ours."""

import ast
import json
import re
from pathlib import Path

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI

from ui.app import build_ui, create_app

UI = Path(__file__).resolve().parents[2] / "ui"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app("http://127.0.0.1:9")


async def fetch(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as browser:
        return await browser.get(path)


async def test_the_page_comes_without_a_key_and_without_foreign_fonts_or_scripts(app: FastAPI) -> None:
    html = (await fetch(app, "/")).text
    assert "windfarm" in html
    loaded = re.findall(r'(?:<script[^>]+src|<link[^>]+href|url\()\s*=?\s*["\']?(https?://[^"\')]+)', html)
    assert loaded == []
    assert "fonts.googleapis" not in html


def test_an_idle_page_keeps_still() -> None:
    """The name is Gradio's own: a version that knows another one would poll a thousand times a second again."""
    blocks = build_ui("http://127.0.0.1:9")
    untouched = gr.Blocks(analytics_enabled=False)
    assert blocks._queue.sleep_when_free > 10 * untouched._queue.sleep_when_free


async def test_events_are_no_public_endpoints(app: FastAPI) -> None:
    info = (await fetch(app, "/gradio_api/info")).json()
    assert info["named_endpoints"] == {}


async def test_the_page_keeps_no_key_and_records_no_runs(app: FastAPI) -> None:
    config = json.loads((await fetch(app, "/config")).text)
    states = [c["props"]["default_value"] for c in config["components"] if c["type"] == "browserstate"]
    assert states == [""]
    assert not config.get("run_history")


def test_the_page_imports_nothing_of_the_other_packages() -> None:
    imported = {
        name.split(".")[0]
        for path in UI.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _names(node)
    }
    assert "gradio" in imported
    assert not imported & {"services", "rag", "cluster", "tests", "infra"}


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_importing_the_page_writes_no_files() -> None:
    """Gradio writes stub files beside modules that subclass its components."""
    assert list(UI.rglob("*.pyi")) == []
