"""A person at a browser: one Chromium with an empty profile, and the few things that people do on the page."""

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import BrowserContext, Locator, Page, Playwright, expect

from infra.setup.chromium import find_chromium

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Two cores serve the browser, the page, the model and the embedding model at once.
PATIENCE_MS = 100_000


class Visitor:
    """`foreign`: requests that went to another host; `faults`: what the page's scripts complained of."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.page: Page = context.pages[0]
        self.address = address
        self.foreign: list[str] = []
        self.faults: list[str] = []
        self.page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        context.on("request", lambda request: self._note(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _note(self, url: str) -> None:
        if not re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:)", url):
            self.foreign.append(url)

    def open(self) -> None:
        self.page.goto(self.address)

    def sign_in(self, key: str) -> None:
        self.open()
        self.page.get_by_label("Your key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.question).to_be_visible()

    @property
    def question(self):  # type: ignore[no-untyped-def]
        return self.page.get_by_label("Question", exact=True)

    @property
    def answers(self):  # type: ignore[no-untyped-def]
        return self.page.locator("#wf-chat .bot.message")

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")

    def wait_until_answered(self) -> None:
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()

    def folded(self, title: str | re.Pattern[str]) -> Locator:
        """A notice or tool step of the chat; a click on its button opens and closes it."""
        return self.page.locator("#wf-chat .thought-group", has_text=title)

    def choose(self, collection: str) -> None:
        self.page.locator("#wf-collections input").click()
        self.page.get_by_role("option", name=collection).click()
        self.page.keyboard.press("Escape")

    def panel(self, name: str) -> None:
        """Open the panel `documents` or `sources`."""
        if self.page.evaluate("document.documentElement.dataset.panel") != name:
            self.page.get_by_role("button", name=name.capitalize(), exact=True).click()

    def choose_no_collection(self) -> None:
        remove = self.page.locator("#wf-collections .token-remove")
        while remove.count():
            remove.first.click()

    def upload(self, *files: Path) -> None:
        self.panel("documents")
        self.page.locator("#wf-files input[type=file]").set_input_files([str(file) for file in files])

    def drop(self, place: Locator, *files: Path) -> None:
        """Drag files from outside onto a place of the page, as the browser itself would get them."""
        box = place.bounding_box()
        assert box is not None
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        session = self.page.context.new_cdp_session(self.page)
        for step in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": step, "data": data, **where})
        session.detach()

    def note_progress(self) -> None:
        """From now on keep what progress bars say, however short they stand there; `progress` reads it."""
        self.page.evaluate(
            """() => {
                window.seenBars = {};
                const look = () => document.querySelectorAll('[role=progressbar]').forEach((bar) => {
                    const seen = (window.seenBars[bar.getAttribute('aria-label')] ??= []);
                    const isDrawn = bar.getBoundingClientRect().height > 0 && bar.firstElementChild.offsetWidth > 0;
                    const value = isDrawn ? Number(bar.getAttribute('aria-valuenow')) : -1;
                    if (seen.at(-1) !== value) seen.push(value);
                });
                new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
            }"""
        )

    def progress(self) -> dict[str, list[int]]:
        """What the bars said one after the other, in percent, by their names; -1 for one that could not be seen."""
        seen: dict[str, list[int]] = self.page.evaluate("window.seenBars")
        return seen

    def wait_for_look(self, css: str, *, is_dark: bool) -> None:
        """Until the element has a dark (or light) ground from which its text stands out: colours may change slowly."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while True:
            ground, text = self.brightness(css), self.brightness(css, "color")
            if (ground < 60 < 150 < text) if is_dark else (ground > 200 > 100 > text):
                return
            assert time.monotonic() < deadline, (css, ground, text)
            self.page.wait_for_timeout(50)

    def brightness(self, css: str, part: str = "backgroundColor") -> float:
        """Of a colour of an element, from 0 (black) to 255 (white)."""
        colour = self.page.locator(css).first.evaluate(f"element => getComputedStyle(element).{part}")
        red, green, blue = (float(value) for value in re.findall(r"[\d.]+", colour)[:3])
        return 0.299 * red + 0.587 * green + 0.114 * blue

    def picture(self, name: str, folder: Path = ARTIFACTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=path, animations="disabled")
        return path


@contextmanager
def visitor(playwright: Playwright, address: str, *, width: int = 1280, height: int = 800) -> Iterator[Visitor]:
    with tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            headless=True,
            args=ARGUMENTS,
            viewport={"width": width, "height": height},
        )
        try:
            yield Visitor(context, address)
        finally:
            context.close()
