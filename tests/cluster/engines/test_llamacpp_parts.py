"""Which requests llama.cpp gets for one prompt: the whole of it, or parts of it first."""

from typing import Any

from cluster.engines.llamacpp_parts import OnItem, complete_in_parts

SIZE = 100


class Server:
    """Knows the beginning of a prompt as far as it computed it. Fails at a request on demand."""

    def __init__(self, num_cached: int = 0, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self._num_cached = num_cached
        self._fails_at = fails_at

    def handle(self, body: dict[str, Any], on_item: OnItem) -> None:
        num_tokens = len(body["prompt"])
        self.asked.append(num_tokens)
        if len(self.asked) == self._fails_at:
            on_item({"error": {"message": "no memory"}})
            return
        if on_item({"prompt_progress": {"cache": self._num_cached, "processed": self._num_cached}}):
            return
        self._num_cached = num_tokens
        on_item({"choices": [{"text": "word" if body["max_tokens"] else "", "finish_reason": "length"}]})


class Heard:
    def __init__(self, leaves_at: int | None = None) -> None:
        self.items: list[Any] = []
        self._leaves_at = leaves_at

    def on_item(self, item: Any) -> bool:
        self.items.append(item)
        return len(self.items) == self._leaves_at

    @property
    def words(self) -> list[str]:
        return [item["choices"][0]["text"] for item in self.items if "choices" in item]


def complete(server: Server, num_tokens: int, heard: Heard) -> None:
    body = {"prompt": list(range(num_tokens)), "max_tokens": 5, "grammar": "root ::= x"}
    body |= {"stream": True, "return_progress": True, "cache_prompt": True}
    complete_in_parts(server.handle, SIZE, body, heard.on_item)


def test_a_prompt_of_one_batch_goes_as_it_is() -> None:
    server, heard = Server(), Heard()
    complete(server, SIZE, heard)
    assert (server.asked, heard.words) == ([SIZE], ["word"])


def test_a_long_prompt_is_taken_back_and_comes_in_parts_of_which_only_the_last_one_answers() -> None:
    server, heard = Server(), Heard()
    complete(server, 250, heard)
    assert (server.asked, heard.words) == ([250, 100, 200, 250], ["word"])


def test_what_is_cached_makes_no_parts() -> None:
    server, heard = Server(num_cached=200), Heard()
    complete(server, 290, heard)
    assert (server.asked, heard.words) == ([290], ["word"])
    server, heard = Server(num_cached=150), Heard()
    complete(server, 290, heard)
    assert (server.asked, heard.words) == ([290, 250, 290], ["word"])


def test_nothing_follows_for_a_client_that_left_between_two_parts() -> None:
    server, heard = Server(), Heard(leaves_at=3)
    complete(server, 450, heard)
    assert (server.asked, heard.words) == ([450, 100, 200], [])
    server, heard = Server(), Heard(leaves_at=1)
    complete(server, 450, heard)
    assert (server.asked, heard.words) == ([450], [])


def test_a_part_that_fails_is_told_and_nothing_follows() -> None:
    server, heard = Server(fails_at=3), Heard()
    complete(server, 450, heard)
    assert (server.asked, heard.items[-1]) == ([450, 100, 200], {"error": {"message": "no memory"}})
