"""What the engine tells the plugin of a continued answer, and that a grammar which does not fit is refused. Real
grammars are advanced in the tests of the engine's contract."""

from types import SimpleNamespace

import pytest

from cluster.vllm_plugin.continued_grammars import advance
from cluster.vllm_plugin.options import continued_arguments, num_delivered_tokens


class Grammar:
    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed
        self.accepted: list[int] = []

    def accept_tokens(self, _request_id: str, token_ids: list[int]) -> bool:
        self.accepted += token_ids
        return set(token_ids) <= set(self.allowed)


def test_the_number_of_delivered_tokens_arrives() -> None:
    assert num_delivered_tokens(SimpleNamespace(extra_args=continued_arguments(7))) == 7
    assert num_delivered_tokens(SimpleNamespace(extra_args=None)) == 0
    assert num_delivered_tokens(SimpleNamespace(extra_args={"kv_transfer_params": {}})) == 0
    assert num_delivered_tokens(None) == 0


def test_a_grammar_is_brought_to_where_the_answer_is() -> None:
    grammar = Grammar(1, 2, 3)
    advance(grammar, "r", [1, 2])
    assert grammar.accepted == [1, 2]


def test_tokens_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit its grammar"):
        advance(Grammar(1), "r", [1, 9])
