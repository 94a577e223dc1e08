"""Imports flow one way: ui -> (HTTP) -> services -> rag, cluster, which never meet; heavy libraries have one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "services", "rag", "ui")

MAY_IMPORT = {"cluster": set(), "rag": set(), "services": {"cluster", "rag", "ui"}, "ui": set()}
"""Folder -> other folders of ours that it may import. `services.app` mounts the page, hence `ui` there."""

ONLY_IN = {
    "qdrant_client": ("rag/vector_store",),
    "qdrant_edge": ("rag/vector_store",),
    "vllm": ("cluster/",),
    "torch": ("cluster/",),
    "transformers": ("cluster/",),
    "xllamacpp": ("cluster/",),
    "ray": ("services/", "cluster/placement"),
    "gradio": ("ui/",),
    "sqlalchemy": ("services/",),
    "kreuzberg": ("rag/",),
}
"""Library -> where it may be imported (prefixes of paths)."""

PRIVATE = ("ray._private", "ray._raylet", "ray.serve._private", "ray.experimental", "ray.llm")

ADAPTERS = {
    "services/ray_adapter.py": "starts a Ray of our own",
    "services/beats.py": "Ray's internal key-value store",
    "services/fork_server.py": "names the modules that Ray's workers import",
    "services/ray_worker.py": "names the script that a raylet starts",
    "services/startup/sitecustomize.py": "names the module of Serve that does without pandas",
    "services/zone_scheduler.py": "replaces the scheduler of Serve's controller",
}
"""The files that know Ray's private parts, be it by name alone; each has contract tests."""

VLLM_ADAPTERS = (
    "cluster/engines/vllm.py",
    "cluster/engines/vllm_answers.py",
    "cluster/engines/vllm_resumption.py",
    "cluster/engines/vllm_start.py",
    "cluster/vllm_plugin/",
)
"""The files that import vLLM, nearly all of which is private; each holds to the version that it was written for."""

ACCESS_ONLY = {
    "search_filtered": ("rag/access.py", "rag/vector_store"),
    "compile_filter": ("rag/access.py",),
    "AccessFilter": ("rag/access.py", "rag/vector_store"),
    "_SEAL": ("rag/access.py",),
    "search_as": ("rag/access.py", "services/retrieval.py", "services/receipts.py"),
    "StoreAsSeenBy": ("rag/access.py", "services/evaluation_index.py"),
    "stored_document": ("services/knowledge.py", "services/reembedding.py", "services/receipts.py"),
}
"""What reads the vector store, and texts of the database -> where it may be used (prefixes of paths).
`services.retrieval` asks the database for the rights, `services.receipts` counts what a deletion left, an evaluation
searches in its own index; texts leave the database through `services.knowledge`, by rights, or to be embedded anew."""

HEAVY = ("torch", "vllm", "transformers", "xllamacpp")

TRANSPORT = ("aiohttp", "fastapi", "httpx", "ray", "starlette", "uvicorn", "services.routing", "services.listener")

CHECKS = ("accounts", "host_check", "limit_book", "limits", "openai_api", "validation")
"""Modules of `services` that check keys, hosts, limits and fields: plain functions without transport."""

TEXT_PATH = ("frame_stream", "frames", "generation", "model_service", "model_wire", "openai_stream", "relay")
"""Modules of `services` that text passes from engine to client: it must not become an object of Ray's."""

LIGHT_PROCESSES = ("services.cli", "ui.app")
"""Modules whose process must stay light and outlive the model replicas; for the endpoint's see the last test."""


def modules() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, also those inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            yield ".".join(base + ([node.module] if node.module else [])), node.lineno


def test_each_folder_imports_only_what_lies_below_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for name, line in imports(path)
        if (other := name.split(".")[0]) in FOLDERS
        and other != (own := path.relative_to(ROOT).parts[0])
        and other not in MAY_IMPORT[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_composition_imports_the_page() -> None:
    """The page talks HTTP; nothing but the process that serves it may know it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for name, line in imports(path)
        if path.parts[len(ROOT.parts)] == "services" and name.split(".")[0] == "ui" and path.stem not in ("app", "page")
    ]
    assert not wrong, "\n".join(wrong)


def test_each_library_is_imported_in_its_own_place_only() -> None:
    wrong = [
        f"{relative}:{line} imports {name}"
        for path in modules()
        for name, line in imports(path)
        if (places := ONLY_IN.get(name.split(".")[0]))
        and not (relative := path.relative_to(ROOT).as_posix()).startswith(places)
    ]
    assert not wrong, "\n".join(wrong)


@cache
def names_in(path: Path) -> list[tuple[str, int]]:
    """(dotted name, line) of imports, and of strings that are nothing but a dotted name, as in a list of modules."""
    names = list(imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and all(part.isidentifier() for part in text.split(".")):
            names.append((text, node.lineno))
    return names


def test_private_parts_of_ray_are_touched_in_their_adapters_only() -> None:
    touched = {
        path.relative_to(ROOT).as_posix(): f"{path.relative_to(ROOT)}:{line} names {name}"
        for path in modules()
        for name, line in names_in(path)
        if name.startswith(PRIVATE)
    }
    wrong = [text for path, text in touched.items() if path not in ADAPTERS]
    assert not wrong, "\n".join(wrong)


def test_vllm_is_touched_in_its_adapters_only() -> None:
    wrong = [
        f"{relative}:{line} names {name}"
        for path in modules()
        for name, line in names_in(path)
        if name.split(".")[0] == "vllm" and name != "vllm" and name != "vllm.windfarm"
        if not (relative := path.relative_to(ROOT).as_posix()).startswith(VLLM_ADAPTERS)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lists_of_adapters_name_no_file_that_touches_nothing_private() -> None:
    """Closed means that they shrink too: who is listed once might touch anything later."""
    marks = (*PRIVATE, "_private", "vllm.")  # `_private` alone: part of a path
    touching = [path for path in modules() for name, _ in names_in(path) if name.startswith(marks)]
    found = [path.relative_to(ROOT).as_posix() for path in touching]
    assert [each for each in (*ADAPTERS, *VLLM_ADAPTERS) if not any(path.startswith(each) for path in found)] == []


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_documents_name_every_file_that_touches_private_parts(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert [path for path in (*ADAPTERS, *VLLM_ADAPTERS) if f"`{path}`" not in text] == []


def uses(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every name that is read, called, imported or looked up on something."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno  # getattr(store, "search_filtered")


def test_text_leaves_the_vector_store_through_the_rights_of_a_reader_alone() -> None:
    """Search, filter and its maker are used where they are made; whoever else searches says for whom."""
    wrong = [
        f"{relative}:{line} uses {name}"
        for path in modules()
        for name, line in uses(path)
        if name in ACCESS_ONLY and not (relative := path.relative_to(ROOT).as_posix()).startswith(ACCESS_ONLY[name])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_vector_store_gives_text_back_in_one_way_only() -> None:
    """A second method that returns chunks would be a second way around the rights."""
    contract = ast.parse((ROOT / "rag" / "vector_store.py").read_text(encoding="utf-8"))
    (store,) = (node for node in contract.body if isinstance(node, ast.ClassDef) and node.name == "VectorStore")
    giving = [
        method.name
        for method in store.body
        if isinstance(method, ast.FunctionDef)
        and method.returns is not None
        and any(word in ast.unparse(method.returns) for word in ("Chunk", "Any", "Passage", "object"))
    ]
    assert giving == ["search_filtered"]


def test_checks_know_no_transport() -> None:
    wrong = [
        f"services/{name}.py:{line} imports {imported}"
        for name in CHECKS
        for imported, line in imports(ROOT / "services" / f"{name}.py")
        if imported in TRANSPORT or imported.split(".")[0] in TRANSPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_text_goes_from_engine_to_client_without_ray() -> None:
    wrong = [
        f"services/{name}.py:{line} imports {imported}"
        for name in TEXT_PATH
        for imported, line in imports(ROOT / "services" / f"{name}.py")
        if imported.split(".")[0] == "ray"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", LIGHT_PROCESSES)
def test_processes_that_outlive_models_load_no_model_library(module: str) -> None:
    program = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ""


def test_an_endpoint_that_answered_has_loaded_no_model_library(tmp_path: Path) -> None:
    """What is imported only when it is needed counts too: chat, vectors, files and readiness were all asked for."""
    program = f"""
import asyncio, sys
from pathlib import Path
import services.gateway
from tests.services.harness import ScriptedEngine, running_endpoint, wait_until, words

async def main():
    async with running_endpoint(Path({str(tmp_path)!r}), ScriptedEngine(*words("Hi")), proves=True) as running:
        async def is_ready():
            return (await running.http.get("/ready")).status_code == 200
        await wait_until(is_ready)
        answers = [
            await running.chat(),
            await running.chat(response_format={{"type": "json_object"}}),
            await running.http.post("/v1/embeddings", json={{"model": "embed", "input": "x"}}),
            await running.http.get("/metrics"),
        ]
        print([answer.status_code for answer in answers])

asyncio.run(main())
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stdout.splitlines() == [str([200] * 4), "[]"], answer.stderr
