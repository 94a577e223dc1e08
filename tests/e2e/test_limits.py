"""Limits of api keys in the running product: set by the command line, counted by the limiter's own process."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.product import Product

pytestmark = pytest.mark.e2e

HELLO: Any = [{"role": "user", "content": "Hello"}]


def limited(product: Product, *options: str) -> dict[str, Any]:
    """A new key with limits."""
    made: dict[str, Any] = json.loads(product.run("key", "--json", "--new", "limited", *options).stdout)
    return made


def client_of(product: Product, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=product.api, api_key=key, max_retries=0, timeout=120)


def test_exactly_the_limit_is_let_in_and_openais_client_sees_a_rate_limit_error(product: Product) -> None:
    client = client_of(product, limited(product, "--requests-per-minute", "4")["key"])

    def ask(number: int) -> str:
        try:
            if number % 2:
                stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, stream=True)
                return "answered" if list(stream) else "empty"
            client.embeddings.create(model="embed", input=["Hello"])
            return "answered"
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded"
            assert 1 <= int(error.response.headers["retry-after"]) <= 60
            return "refused"

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(ask, range(10)))
    assert (answers.count("answered"), answers.count("refused")) == (4, 6)
    metrics = httpx.get(f"{product.address}/metrics", headers=product.headers).text
    assert 'windfarm_limit_refusals_total{reason="requests"} 6.0' in metrics


def test_a_changed_limit_holds_in_the_running_product(product: Product) -> None:
    made = limited(product, "--tokens-per-minute", "10")
    client = client_of(product, made["key"])
    with pytest.raises(openai.RateLimitError, match="too large for the tokens per minute"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100)
    product.run("key", "--change", made["id"], "--tokens-per-minute", "100000")
    for _ in range(60):  # a proved key is remembered for two seconds
        try:
            answer = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=12)
            break
        except openai.RateLimitError:
            time.sleep(0.1)
    else:
        pytest.fail("the new limit does not hold")
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
