"""Takes the pictures of the README from the real product: `python -m tests.e2e.screenshots [FOLDER]`."""

import sys
import tempfile
from pathlib import Path

import httpx
from playwright.sync_api import Playwright, expect, sync_playwright

from tests.e2e.visitor import Visitor, visitor
from tests.product import ROOT, Product, start_product

IMAGES = ROOT / "infra" / "images"
HANDBOOK = ROOT / "tests" / "data" / "company-kb" / "gds-way-en" / "standards"
FIRST = ("pull-requests.md", "logging.md", "alerting.md")
LATER = ("pair-programming.md", "monitoring.md", "storing-credentials.md")
QUESTION = "How long are logs kept?"


def take_pictures(product: Product, playwright: Playwright, folder: Path) -> None:
    fill_handbook(product)
    with visitor(playwright, product.address, width=1440, height=900) as person:
        ask_the_handbook(person, product)
        open_citation(person)
        person.picture("chat", folder)
        address = person.page.url
        person.page.get_by_role("button", name="Switch between light and dark").click()
        person.picture("dark", folder)
        person.page.get_by_role("button", name="Switch between light and dark").click()
        person.upload(*[HANDBOOK / name for name in LATER])
        expect(person.page.locator("#wf-uploads .is-done")).not_to_have_count(0)
        person.picture("documents", folder)
    with visitor(playwright, address, width=390, height=844) as person:
        person.sign_in(product.key)
        expect(person.answers.last).to_be_visible()
        person.picture("phone", folder)


def fill_handbook(product: Product) -> None:
    with httpx.Client(base_url=product.address, headers=product.headers, timeout=120) as api:
        api.post("/v1/collections", json={"name": "handbook"}).raise_for_status()
        for name in FIRST:
            file = {"file": (name, (HANDBOOK / name).read_bytes())}
            api.post("/v1/collections/handbook/documents?wait=true", files=file).raise_for_status()


def ask_the_handbook(person: Visitor, product: Product) -> None:
    person.sign_in(product.key)
    person.choose("handbook")
    person.ask(QUESTION)
    person.wait_until_answered()


def open_citation(person: Visitor) -> None:
    person.page.locator('#wf-chat a[href^="#cite-msg"]').first.click()
    expect(person.page.locator(".wf-source.is-open mark")).to_be_visible()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    with (
        tempfile.TemporaryDirectory() as home,
        start_product(Path(home) / "home") as product,
        sync_playwright() as running,
    ):
        take_pictures(product, running, folder)


if __name__ == "__main__":
    main()
