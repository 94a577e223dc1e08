"""A real Chromium on the real product: sign in, add a document, ask, open a citation, stop, reload, go on."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Playwright, expect, sync_playwright

from tests.e2e.other_api import other_api
from tests.e2e.visitor import Visitor, visitor
from tests.product import ROOT, Product

pytestmark = [pytest.mark.e2e, pytest.mark.requires("chromium")]

DOCUMENTS = ROOT / "tests" / "data" / "documents"


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture
def person(playwright: Playwright, product: Product) -> Iterator[Visitor]:
    """Somebody with a new browser. In the end: nothing was asked of another host, no script complained."""
    with visitor(playwright, product.address) as somebody:
        yield somebody
        assert somebody.foreign == []
        assert somebody.faults == []


@pytest.fixture
def second_model(product: Product, tmp_path: Path) -> Iterator[str]:
    """A model `second` of the running product, at somebody else's API; gives what it always says."""
    sentence = "I am the second model."
    text = (ROOT / "ray_config.yaml").read_text("utf-8")
    with other_api(sentence) as source:
        line = (
            "  - {name: llm-second, route_prefix: null, import_path: 'services.app:build_model', "
            f"args: {{id: second, source: '{source}'}}}}\n"
        )
        before, name, after = text.partition("  - name: embed\n")
        edited = tmp_path / "edited.yaml"
        edited.write_text(before + line + name + after, "utf-8")
        try:
            product.run("apply", "--config", str(edited))
            yield sentence
        finally:
            product.run("apply", "--config", str(ROOT / "ray_config.yaml"))


def test_a_wrong_key_is_told_in_words(person: Visitor) -> None:
    person.open()
    person.page.get_by_label("Your key").fill("wf-wrong")
    person.page.get_by_role("button", name="Sign in").click()
    expect(person.page.get_by_role("alert")).to_contain_text("This key is not valid")
    assert "wf-wrong" not in person.page.url


def test_a_newcomer_drops_a_pdf_asks_and_opens_the_citation(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.note_progress()
    person.drop(person.page.locator("#wf-chat"), DOCUMENTS / "fake-memo.pdf", DOCUMENTS / "empty.txt")
    uploads = person.page.locator("#wf-uploads")
    expect(uploads.locator(".is-done")).to_contain_text("fake-memo.pdf")
    expect(uploads.locator(".is-failed")).to_contain_text("empty.txt")
    expect(uploads.locator(".is-failed p")).not_to_be_empty()
    expect(uploads.get_by_role("progressbar")).to_have_count(0)
    bar = person.progress()["fake-memo.pdf"]
    assert bar == sorted(bar) and 0 <= bar[0] <= bar[-1] <= 100, "the bar was seen, and only grew"
    expect(person.page.locator("#wf-collections .token")).to_have_count(1)

    person.ask("How many laptops were delivered on January 23?")
    mark = person.page.locator('#wf-chat a[href^="#cite-msg"]').first
    expect(mark).to_be_visible()
    person.wait_until_answered()
    mark.click()
    opened = person.page.locator(".wf-source.is-open")
    expect(opened).to_contain_text("fake-memo.pdf")
    page = opened.locator(".wf-page img")
    expect(page).to_have_attribute("alt", re.compile("Page 1 of fake-memo.pdf; the cited passage is marked"))
    assert page.evaluate("async image => { await image.decode(); return image.naturalWidth }") > 500
    person.picture("citation")


def test_text_streams_can_be_stopped_and_the_conversation_goes_on_after_a_reload(
    person: Visitor, product: Product
) -> None:
    person.sign_in(product.key)
    person.choose_no_collection()
    person.ask("Write a very long story about a windmill, a miller and the sea.")
    lengths = person.page.evaluate(
        """async () => {
            const seen = new Set(), text = () => document.querySelector('#wf-chat .bot.message')?.innerText.length ?? 0;
            while (seen.size < 5) {
                if (text()) seen.add(text());
                await new Promise(requestAnimationFrame);
            }
            return [...seen];
        }"""
    )
    assert lengths == sorted(lengths), "the text grows"
    person.page.get_by_role("button", name="Stop", exact=True).click()
    expect(person.page.locator("#wf-chat")).to_contain_text("Stopped")
    kept = person.answers.first.inner_text()
    address = person.page.url
    assert re.search(r"[?&]c=conv_", address)

    person.page.reload()
    expect(person.page.locator("#wf-chat")).to_contain_text("Stopped")
    assert person.page.url == address
    assert person.answers.first.inner_text() == kept
    person.ask("Say hello.")
    expect(person.page.locator("#wf-chat .user.message")).to_have_count(2)
    person.wait_until_answered()
    expect(person.page.locator("#wf-chat .message-row.bot-row")).to_have_count(2)


def test_an_answer_can_be_asked_for_again_and_replaces_the_first(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.choose_no_collection()
    person.ask("Name one colour.")
    person.wait_until_answered()
    person.page.get_by_role("button", name="Retry").click()
    person.wait_until_answered()
    expect(person.page.locator("#wf-chat .user.message")).to_have_count(1)
    expect(person.page.locator("#wf-chat .message-row.bot-row")).to_have_count(1)


def test_conversations_are_renamed_deleted_and_left(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.choose_no_collection()
    person.ask("Say hello.")
    person.wait_until_answered()
    row = person.page.locator(".wf-conversation.is-current")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    person.page.get_by_label("New title").fill("Called otherwise")
    person.page.get_by_label("New title").press("Enter")
    expect(person.page.locator(".wf-conversation.is-current")).to_contain_text("Called otherwise")
    person.page.reload()
    row = person.page.locator(".wf-conversation", has_text="Called otherwise")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    expect(person.page.locator("#wf-chat .user.message")).to_have_count(0)


def test_tool_steps_and_what_was_left_out_can_be_seen(person: Visitor, product: Product) -> None:
    """The model that comes along chooses no tool by itself, so another client of the same conversation forces it."""
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=120) as api:
        conversation = api.post("/conversations", json={"title": "Seen on the page"}).json()["id"]
        body = {"model": "tiny", "conversation": conversation, "temperature": 0, "max_tokens": 32}
        question = {"role": "user", "content": "What is 37 * 21?"}
        forced = {
            "windfarm_tools": ["calculator"],
            "tool_choice": {"type": "function", "function": {"name": "calculator"}},
        }
        api.post("/chat/completions", json=body | forced | {"messages": [question]}).raise_for_status()
        too_long = [
            {"role": "user", "content": "A long story. " * 3000},
            {"role": "assistant", "content": "Thank you."},
            {"role": "user", "content": "Say hello."},
        ]
        api.post("/chat/completions", json=body | {"messages": too_long}).raise_for_status()
    person.address = f"{product.address}/?c={conversation}"
    person.sign_in(product.key)
    tool = person.folded("Tool: calculator").first
    tool.get_by_role("button").first.click()
    expect(tool).to_contain_text("expression")
    expect(tool).to_contain_text(re.compile("Result|Failed"))
    left_out = person.folded(re.compile("Left out: .*older message"))
    expect(left_out).to_be_visible()
    person.picture("steps")


def test_without_evidence_the_page_says_that_the_documents_do_not_say_it(person: Visitor, product: Product) -> None:
    memo = DOCUMENTS / "fake-memo.pdf"
    with httpx.Client(base_url=product.api, headers=product.headers, timeout=120) as api:
        api.post("/collections", json={"name": "memos-for-the-page"}).raise_for_status()
        files = {"file": (memo.name, memo.read_bytes())}
        api.post("/collections/memos-for-the-page/documents?wait=true", files=files).raise_for_status()
        person.sign_in(product.key)
        person.choose_no_collection()
        person.choose("memos-for-the-page")
        person.ask("What is the capital of Mongolia?")
        expect(person.folded("The documents do not say")).to_be_visible()
        expect(person.answers.last).to_contain_text("I could not find")
        person.wait_until_answered()
        expect(person.page.locator('#wf-chat a[href^="#cite-msg"]')).to_have_count(0)
        api.delete("/collections/memos-for-the-page").raise_for_status()


def test_a_file_dropped_on_the_field_is_added_too(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.panel("documents")
    person.drop(person.page.locator("#wf-files"), DOCUMENTS / "empty.txt")
    expect(person.page.locator("#wf-uploads .is-failed")).to_contain_text("empty.txt")


def test_light_and_dark_follow_the_system_until_the_switch_is_pressed(person: Visitor, product: Product) -> None:
    person.page.emulate_media(color_scheme="light")
    person.sign_in(product.key)
    body, switch = person.page.locator("body"), person.page.get_by_role("button", name="Switch between light and dark")

    def expect_look(is_dark: bool) -> None:
        """Page and side bar have the ground of that look, and text stands out from it."""
        told = re.compile(r"\bdark\b")
        expect(body).to_have_class(told) if is_dark else expect(body).not_to_have_class(told)
        for css in ("body", "#wf-side"):
            person.wait_for_look(css, is_dark=is_dark)

    expect_look(is_dark=False)
    person.page.emulate_media(color_scheme="dark")
    expect_look(is_dark=True)
    switch.click()
    expect_look(is_dark=False)
    person.page.reload()
    expect(person.question).to_be_visible()
    expect_look(is_dark=False)  # The choice holds against the system's.
    switch.click()
    expect_look(is_dark=True)


def test_the_chosen_model_answers_and_stays_chosen(person: Visitor, product: Product, second_model: str) -> None:
    person.sign_in(product.key)
    person.choose_no_collection()
    chosen = person.page.locator("#wf-model input")
    expect(chosen).to_have_value("tiny")
    chosen.click()
    person.page.get_by_role("option", name="second", exact=True).click()
    person.ask("Who are you?")
    expect(person.answers.last).to_contain_text(second_model)
    person.wait_until_answered()
    person.page.reload()
    expect(person.page.locator("#wf-chat")).to_contain_text(second_model)
    expect(chosen).to_have_value("second")


def test_signing_out_forgets_the_key(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.page.get_by_role("button", name="Sign out").click()
    expect(person.page.get_by_label("Your key")).to_be_visible()
    person.page.reload()
    expect(person.page.get_by_label("Your key")).to_be_visible()
    assert product.key not in str(person.page.evaluate("JSON.stringify({...localStorage})"))


def test_the_key_stands_in_no_log(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.ask("Hello")
    person.wait_until_answered()
    logs = [path for path in product.home.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")]
    assert logs
    assert [path for path in logs if product.key in path.read_text(errors="replace")] == []
