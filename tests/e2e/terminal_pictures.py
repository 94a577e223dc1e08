"""Takes the README's pictures of the terminal: `python -m tests.e2e.terminal_pictures [FOLDER]`.

A plan, and the experts of the bundled mixture on two ranks after questions in five languages, drawn by the commands.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.product import ROOT, Product, logs, start_product

IMAGES = ROOT / "infra" / "images"
LANGUAGES = ("de", "en", "es", "fr", "it")
QUESTIONS_PER_LANGUAGE = 6
START_LIMIT_S = 200
PLAN = ("mixtral-8x7b", "--nodes", "infra/nodes/mixtral-2x4x40gb.yaml", "--replicas", "2")


def with_small(folder: Path) -> Path:
    """The configuration with the line of the mixture taken into use, as its comment says."""
    text = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")
    turned_on = text.replace("  # - {name: llm-small,", "  - {name: llm-small,")
    assert turned_on != text, "ray_config.yaml has the line of the mixture"
    path = folder / "with-small.yaml"
    path.write_text(turned_on, encoding="utf-8")
    return path


def questions() -> list[str]:
    found = []
    for language in LANGUAGES:
        lines = (ROOT / "tests" / "data" / "multilingual-qa-mini" / language / "queries.jsonl").read_text("utf-8")
        found += [json.loads(line)["text"] for line in lines.splitlines()[:QUESTIONS_PER_LANGUAGE]]
    return found


def wait_for_small(product: Product) -> None:
    """`windfarm up` returns when the default model answers; the mixture may take longer."""
    deadline = time.monotonic() + START_LIMIT_S
    with httpx.Client(base_url=product.address, headers=product.headers, timeout=60, trust_env=False) as api:
        while (answer := api.get("/v1/cluster/experts", params={"model": "small"})).status_code == 503:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{answer.text}\n{product.run('status').stdout}\n{logs(product.home)}")
            time.sleep(1)
        answer.raise_for_status()


def ask_all(product: Product) -> None:
    def ask(question: str) -> None:
        body = {"model": "small", "messages": [{"role": "user", "content": question}], "max_tokens": 48}
        api.post("/v1/chat/completions", json=body).raise_for_status()

    with (
        httpx.Client(base_url=product.address, headers=product.headers, timeout=300, trust_env=False) as api,
        ThreadPoolExecutor(8) as people,
    ):
        list(people.map(ask, questions()))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    with tempfile.TemporaryDirectory() as scratch:
        config = with_small(Path(scratch))
        with start_product(Path(scratch) / "home", ["--config", str(config)]) as product:
            wait_for_small(product)
            ask_all(product)
            product.run("experts", "small", "--svg", str(folder / "experts.svg"))
            product.run("plan", *PLAN, "--svg", str(folder / "plan.svg"))


if __name__ == "__main__":
    main()
