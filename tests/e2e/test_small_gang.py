"""The bundled mixture as its users turn it on: the one line of ray_config.yaml, on two ranks of this machine.

About six gigabytes of memory and a minute, so `make test-ranks` runs it; `test_gangs.py` is the short form.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services import supervisor
from tests.e2e.terminal_pictures import wait_for_small, with_small
from tests.product import Product, start_product

pytestmark = [pytest.mark.e2e, pytest.mark.ranks, pytest.mark.requires("vllm"), pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def product_with_small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("small")
    config: Path = with_small(folder)
    with start_product(folder / "home", ["--config", str(config)]) as product:
        wait_for_small(product)
        yield product


def ask(product: Product, model: str) -> str:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": 16,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    answer = httpx.post(
        f"{product.api}/chat/completions", json=body, headers=product.headers, timeout=120, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_one_line_of_the_configuration_serves_the_mixture_as_a_gang(product_with_small: Product) -> None:
    (gang,) = supervisor.status(product_with_small.home)["gangs"]["llm-small"]["gangs"].values()
    assert gang["is_complete"]
    assert [rank["rank"] for rank in gang["ranks"]] == [0, 1]
    # Its experts are copies of the parent's block, and so it knows what the parent knows.
    assert "Paris" in ask(product_with_small, "small")
    assert ask(product_with_small, "tiny")
