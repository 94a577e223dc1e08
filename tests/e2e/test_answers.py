"""What an answer of the running product carries: exact citations, an honest refusal, visible steps of tools."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.product import ROOT, Product

pytestmark = pytest.mark.e2e

MEMO = ROOT / "tests" / "data" / "documents" / "fake-memo.pdf"


@pytest.fixture(scope="module")
def client(product: Product) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=180) as client:
        yield client


@pytest.fixture(scope="module")
def memos(client: httpx.Client) -> Iterator[str]:
    """A collection with a PDF, and with a page that also counts laptops and names a day."""
    name = "memos-for-answers"
    client.post("/collections", json={"name": name}).raise_for_status()
    for file in ((MEMO.name, MEMO.read_bytes()), ("repairs.md", b"Of all laptops, 35 were repaired on March 2.")):
        job = client.post(f"/collections/{name}/documents?wait=true", files={"file": file}).json()["job"]
        assert job["state"] == "done", job
    yield name
    client.delete(f"/collections/{name}").raise_for_status()


def ask(client: httpx.Client, question: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0}
    answer = client.post("/chat/completions", json=body | fields)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_a_citation_says_document_page_span_text_and_score(client: httpx.Client, memos: str) -> None:
    question = "What was delivered on January 23?"
    answer = ask(client, question, knowledge={"collections": [memos]})
    said = answer["choices"][0]["message"]["content"]
    citations = answer["windfarm"]["citations"]
    assert citations, said
    assert "200" in said
    assert "200 laptops delivered on January 23" in " ".join(citations[0]["text"].split())
    for start, end in answer["windfarm"]["unsupported"]:
        assert 0 <= start < end <= len(said)
    for citation in citations:
        document = client.get(f"/collections/{memos}/documents/{citation['document_id']}").json()
        page = next(page for page in document["pages"] if page["number"] == citation["page"])
        assert citation["document"] == MEMO.name, citation
        assert page["start"] <= citation["start"] < citation["end"] <= page["end"]
        assert document["text"][citation["start"] : citation["end"]] == citation["text"]
        assert citation["score"] > 0
        assert citation["answer_spans"]
        for start, end in citation["answer_spans"]:
            assert f"[{citation['number']}]" in said[start:end]


def test_without_evidence_the_answer_says_so(client: httpx.Client, memos: str) -> None:
    answer = ask(client, "What is the capital of Mongolia?", knowledge={"collections": [memos]})
    assert answer["windfarm"]["evidence"] == "none"
    assert answer["windfarm"]["citations"] == []
    assert answer["choices"][0]["message"]["content"].startswith("I could not find")


def test_a_forced_tool_call_runs_and_its_steps_are_in_the_stream(client: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is 37 * 21?"}],
        "windfarm_tools": ["calculator"],
        "tool_choice": {"type": "function", "function": {"name": "calculator"}},
        "temperature": 0,
        "max_tokens": 32,
        "stream": True,
    }
    with client.stream("POST", "/chat/completions", json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    steps = [event["windfarm"] for line in lines[:-1] if "windfarm" in (event := json.loads(line))]
    called, result = [step for step in steps if step["event"] in ("tool_call", "tool_result")][:2]
    assert (called["event"], called["name"]) == ("tool_call", "calculator")
    assert set(json.loads(called["arguments"])) == {"expression"}
    assert (result["event"], result["id"]) == ("tool_result", called["id"])


def test_token_ids_of_the_embedding_model_give_the_vector_of_their_text(client: httpx.Client, product: Product) -> None:
    tokenizer = Tokenizer.from_file(str(next((product.home / "models" / "embed").rglob("tokenizer.json"))))
    ids = tokenizer.encode("Water for the office").ids
    vectors = []
    for given in ("Water for the office", ids, [ids]):
        body = {"model": "embed", "input": given, "input_type": "raw"}
        vectors.append(client.post("/embeddings", json=body).json()["data"][0]["embedding"])
    assert vectors[1] == vectors[2] == pytest.approx(vectors[0], abs=1e-3)
    refused = client.post("/embeddings", json={"model": "embed", "input": [9_999_999], "input_type": "raw"})
    assert refused.status_code == 400
    assert "lie between 0 and" in refused.json()["error"]["message"]


def test_an_unknown_model_or_collection_is_a_404_that_names_it(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}]}
    for fields, code in (
        ({"model": "huge"}, "model_not_found"),
        ({"knowledge": {"collections": ["nowhere"]}}, "unknown_collection"),
    ):
        answer = client.post("/chat/completions", json=body | fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_rights_and_deletion_hold_in_the_running_product(client: httpx.Client, product: Product) -> None:
    """By the commands, across all processes: shared, asked, revoked, deleted with its receipt."""
    key = json.loads(product.run("user", "add", "anna", "--json").stdout)["key"]
    client.post("/collections", json={"name": "laptops"}).raise_for_status()
    with MEMO.open("rb") as file:
        job = client.post("/collections/laptops/documents?wait=true", files={"file": (MEMO.name, file)}).json()["job"]
    question = "How many laptops were delivered on January 23?"
    with httpx.Client(base_url=product.api, headers={"authorization": f"Bearer {key}"}, timeout=180) as anna:

        def search() -> httpx.Response:
            return anna.post("/collections/laptops/search", json={"query": question})

        assert search().status_code == 404
        product.run("group", "add", "buyers")
        product.run("share", "laptops", "--group", "buyers")
        assert search().status_code == 404
        product.run("group", "join", "buyers", "anna")
        assert search().json()["passages"]
        assert ask(anna, question, knowledge={"collections": ["laptops"]})["windfarm"]["citations"]
        product.run("share", "laptops", "--document", job["document_id"], "--not-group", "buyers")
        assert search().json()["passages"] == []
        receipt = json.loads(product.run("delete", "laptops", job["document_id"], "--json").stdout)
        assert receipt["num_passages"] == job["num_chunks"] and receipt["self_check"]["is_clean"]
        assert receipt["receipt_id"] in product.run("receipts").stdout
        assert client.post("/collections/laptops/search", json={"query": question}).json()["passages"] == []
    product.run("delete", "laptops")
