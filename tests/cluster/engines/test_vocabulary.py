"""Tokens that an engine swallowed while a character was incomplete are found again."""

import pytest

from cluster.catalogue import TINY
from cluster.engines.vocabulary import Vocabulary, hidden_token_ids
from cluster.gguf_metadata import GgufMetadata, read_gguf_metadata


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(read_gguf_metadata(TINY.file.locate()))


def test_tokens_spell_bytes(vocabulary: Vocabulary) -> None:
    assert vocabulary.token_bytes[7042] == b" Paris"
    assert vocabulary.token_bytes[218] == b"\x80"
    assert vocabulary.token_bytes[1] == b"<|im_start|>"


def test_tokens_that_end_an_answer_are_known_and_add_nothing_to_it(vocabulary: Vocabulary) -> None:
    assert vocabulary.end_ids == {0, 2}
    assert [vocabulary.shown_bytes(token_id) for token_id in (0, 2, 7042)] == [b"", b"", b" Paris"]


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [("😀", (218,), (10813, 242)), ("é", (119,), (142,)), ("字", (241,), (176, 251)), ("a", (81,), ())],
)
def test_hidden_tokens_are_told_by_the_bytes_that_are_missing(vocabulary, text, shown, hidden) -> None:
    assert hidden_token_ids(vocabulary, text, shown, len(hidden)) == hidden
    spelled = b"".join(vocabulary.token_bytes[token_id] for token_id in hidden + shown)
    assert spelled == text.encode()


def test_where_nothing_fits_nothing_is_made_up(vocabulary: Vocabulary) -> None:
    assert hidden_token_ids(vocabulary, "é", (119,), 5) == ()
    assert hidden_token_ids(vocabulary, "x", (119,), 1) == ()


def test_sentence_pieces_spell_blanks_and_single_bytes() -> None:
    tokens = ["\u2581the".encode(), b"<0xC3>", b"<0xA9>", b"</s>"]
    metadata = GgufMetadata(TINY.file.locate(), {"tokenizer.ggml.model": b"llama", "tokenizer.ggml.tokens": tokens})
    assert Vocabulary(metadata).token_bytes == [b" the", b"\xc3", b"\xa9", b"</s>"]
    assert Vocabulary(metadata).end_ids == {3}
    assert hidden_token_ids(Vocabulary(metadata), " theé", (2,), 2) == (0, 1)
