"""What the README tells people to type works: targets and options exist, and its examples run on the real product."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.product import WINDFARM, Product

ROOT = Path(__file__).resolve().parents[1]
HANDBOOK = "tests/data/company-kb/gds-way-en/standards"
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CONTRIBUTING.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(info: str) -> list[str]:
    """Contents of the fenced blocks with this info string."""
    return re.findall(rf"^```{info}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """Every line of a shell block and every inline code that starts with the program, in any document."""
    found = set()
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        shell = "".join(re.findall(r"^```sh[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).splitlines()
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        found |= {line.strip() for line in (*shell, *inline) if re.match(rf"(?:\w+=\S+ )*{program} ", line.strip())}
    return sorted(found)


@pytest.mark.parametrize("command", commands("make"))
def test_the_make_target_exists(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    words = command.split("make ", 1)[1].split()
    assert [word for word in words if "=" not in word and word not in targets] == []


GROUPS = ("eval", "feedback", "group", "jobs", "kb", "user")
"""Commands whose second word is a command as well."""


@cache
def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    answer = subprocess.run(
        [WINDFARM, *command, "--help"], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize("command", commands("windfarm"))
def test_the_windfarm_command_and_its_options_exist(command: str) -> None:
    words = command.split()
    text = help_of(*words[1 : 3 if words[1] in GROUPS else 2])
    assert [word for word in words if word.startswith("--") and word.split("=")[0] not in text] == []


def test_files_that_the_documents_link_to_exist() -> None:
    missing = [
        f"{document}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8"))
        if not (ROOT / target).exists()
    ]
    assert not missing


def test_modules_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:services|cluster|rag|ui)/[\w/.]+)`", README))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.fixture
def short_clone(tmp_path: Path) -> Path:
    """The repository with a few pages of the handbook: the commands are those of the README, the work is less."""
    for name in (".venv", "ray_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    handbook = tmp_path / HANDBOOK
    handbook.mkdir(parents=True)
    for page in ("pull-requests.md", "pair-programming.md", "logging.md"):
        shutil.copy(ROOT / HANDBOOK / page, handbook)
    return tmp_path


@pytest.mark.e2e
def test_the_shell_examples_run(product: Product, short_clone: Path) -> None:
    script = "set -e\n" + "".join(blocks("sh run"))
    assert HANDBOOK in script
    environment = {**os.environ, "WINDFARM_HOME": str(product.home), "PATH": f"{WINDFARM.parent}:{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "-c", script], cwd=short_clone, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    sources = re.findall(r"^\[(\d+)\] (.+?): (.+)$", answer.stdout, re.MULTILINE)
    assert sources, answer.stdout
    said = answer.stdout[: answer.stdout.index(f"\n[{sources[0][0]}] ")]
    for number, document, quote in sources:
        assert f"[{number}]" in said, answer.stdout
        assert quote in " ".join((short_clone / HANDBOOK / document).read_text(encoding="utf-8").split())
    assert "logging.md" in [document for _, document, _ in sources], answer.stdout


RUN = (
    "plan mixtral-8x7b",
    "key --new",
    "key --list",
    "sync docs --collection handbook --dry-run",
    "user add",
    "group add",
    "group join",
    "share handbook",
    "jobs list",
    "jobs pause",
    "jobs resume",
    "jobs show",
    "feedback list",
    "feedback accept",
    "feedback reject",
    "eval from-feedback",
    "kb export",
    "kb import",
    "backup",
    "delete handbook",
    "receipts",
)
"""Commands of other places that run on a product with a handbook in it, in this order. The rest needs a network (web
pages, git), more machines, other models, a job that is under way or minutes (evaluations), never ends, or turns the
product back (restore)."""


def lines_of(command: str) -> list[str]:
    """The lines of the README's shell blocks with this command, or where it stands in the text."""
    places = ("".join(blocks("sh")).splitlines(), re.findall(r"`(windfarm [^`\n]+)`", README))
    of_each = [[line for line in lines if f"{line} ".startswith(f"windfarm {command} ")] for lines in places]
    found = of_each[0] or of_each[1]
    assert found, f"the README says nothing of {command}"
    return found


def give_feedback(client: httpx.Client) -> list[str]:
    """On two short answers; the ids of the feedback."""
    knowledge = {"knowledge": {"collections": ["handbook"]}}
    conversation = client.post("/conversations", json={"collections": ["handbook"]}).json()["id"]
    for text in ("Who may review a pull request?", "What belongs into a pull request?"):
        body = {"model": "tiny", "conversation": conversation, "max_tokens": 2} | knowledge
        client.post("/chat/completions", json=body | {"messages": [{"role": "user", "content": text}]})
    kept = client.get(f"/conversations/{conversation}").json()["messages"]
    place = {"conversation": conversation, "rating": "up"}
    answers = [message["id"] for message in kept if message["role"] == "assistant"]
    return [client.post("/feedback", json=place | {"message": answer}).json()["id"] for answer in answers]


@pytest.mark.e2e
def test_the_commands_of_other_blocks_run(product: Product, tmp_path: Path) -> None:
    """In one shell, with the ids of things that are there in the place of the README's."""
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=120) as client:
        client.delete("/collections/handbook")
        client.post("/collections", json={"name": "handbook"}).raise_for_status()
        page = (ROOT / HANDBOOK / "pull-requests.md").read_bytes()
        sent = client.post("/collections/handbook/documents?wait=true", files={"file": ("pull-requests.md", page)})
        job = sent.json()["job"]
        lines = [line for command in RUN for line in lines_of(command)]
        # What is imported must not be there any more.
        at = next(number for number, line in enumerate(lines) if line.startswith("windfarm kb import"))
        lines.insert(at, "windfarm collections --delete handbook > deleted.txt")
        script = "set -ex\n" + "\n".join(lines)
        ids = {"doc_5f3a": job["document_id"], "doc_3c4d": job["document_id"], "job_1": job["id"]}
        ids |= dict(zip(("fb_1f2e", "fb_9a8b"), give_feedback(client), strict=True))
        for written, meant in (ids | {" anna": " anna-of-hr"}).items():
            script = script.replace(written, meant)
        (tmp_path / "infra").symlink_to(ROOT / "infra")
        (tmp_path / "docs").mkdir()
        shutil.copy(ROOT / HANDBOOK / "logging.md", tmp_path / "docs")
        environment = {
            **os.environ,
            "WINDFARM_HOME": str(product.home),
            "PATH": f"{WINDFARM.parent}:{os.environ['PATH']}",
        }
        answer = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert client.get("/collections/handbook/documents").json()["data"] == []  # that which was imported is deleted
        client.delete("/collections/handbook").raise_for_status()
    assert "handbook: 1 documents" in answer.stdout
    assert "mixtral-8x7b: 2 x 4 ranks" in answer.stdout
    assert "handbook: 1 new" in answer.stdout
    assert "1 questions on 1 documents" in answer.stdout
    assert "'pull-requests.md' is deleted: nothing is left." in answer.stdout
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("handbook.kb", "monday.backup"))


@pytest.mark.e2e
def test_the_example_of_vector_stores_runs(product: Product, tmp_path: Path) -> None:
    (example,) = blocks("py")
    shutil.copy(ROOT / "tests/data/documents/fake-memo.pdf", tmp_path / "report.pdf")
    client = f"from openai import OpenAI\nclient = OpenAI(base_url={product.api!r}, api_key={product.key!r})\n"
    clean_up = "client.vector_stores.delete(store.id)\n"
    answer = subprocess.run(
        [sys.executable, "-c", client + example + clean_up], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert re.match(r"[01]?\.\d+ report\.pdf \S", answer.stdout), answer.stdout


@pytest.mark.e2e
def test_the_python_example_runs_and_cites(product: Product) -> None:
    product.run("ingest", f"{HANDBOOK}/logging.md", "--collection", "handbook")
    (example,) = blocks("python")
    example = example.replace("http://127.0.0.1:8000/v1", product.api).replace(
        "the key that make up printed", product.key
    )
    answer = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    cited = re.findall(r"^\d+ (?:.* › )?(\S+\.md) (.+)$", answer.stdout, re.MULTILINE)
    assert cited, answer.stdout
    # Which sentence a small model repeats differs between processors; what is cited must stand in the document.
    for name, quote in cited:
        (page,) = (ROOT / HANDBOOK).rglob(name)
        assert quote in page.read_text(encoding="utf-8")
