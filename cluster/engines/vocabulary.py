"""Bytes of a GGUF vocabulary's tokens, and which tokens a piece of text was made of. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from cluster.gguf_metadata import GgufMetadata

_UNKNOWN, _CONTROL = 2, 3
# llama.cpp ends an answer at these too, whatever the file calls its end token.
_END_TOKENS = {
    b"</s>",
    b"<|im_end|>",
    b"<|eot_id|>",
    b"<|eom_id|>",
    b"<|end|>",
    b"<|return|>",
    b"<|call|>",
    b"<|endoftext|>",
    b"<end_of_turn>",
    b"<EOT>",
    b"[EOT]",
    b"[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>".encode(),
    b"<end_of_utterance>",
}


class Vocabulary:
    """`token_bytes[i]` is how token `i` is spelled, `shown_bytes(i)` what it adds to an answer's text."""

    def __init__(self, metadata: GgufMetadata) -> None:
        self._tokens = metadata.tokens
        self._kinds: Sequence[int] = metadata.values.get("tokenizer.ggml.token_type", ())
        named = {metadata.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        self.end_ids = frozenset(
            token_id for token_id, token in enumerate(self._tokens) if token in _END_TOKENS or token_id in named
        )
        """Tokens that end an answer."""
        self._is_byte_level = metadata.text("tokenizer.ggml.model") == "gpt2"

    def __len__(self) -> int:
        return len(self._tokens)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        decode = _decode_byte_level if self._is_byte_level else _decode_sentence_piece
        return [decode(token) for token in self._tokens]

    def shown_bytes(self, token_id: int) -> bytes:
        """llama.cpp writes neither control tokens nor the unknown one."""
        is_hidden = token_id < len(self._kinds) and self._kinds[token_id] in (_UNKNOWN, _CONTROL)
        return b"" if is_hidden else self.token_bytes[token_id]

    @cached_property
    def _ids_of_bytes(self) -> dict[bytes, int]:
        return {value: token_id for token_id, value in reversed(list(enumerate(self.token_bytes))) if value}

    def split(self, data: bytes, num_tokens: int) -> tuple[int, ...] | None:
        """`num_tokens` token ids that spell `data`, longest tokens first; none where there are no such tokens."""
        return next(self._splits(data, num_tokens), None)

    def _splits(self, data: bytes, num_tokens: int) -> Iterator[tuple[int, ...]]:
        if num_tokens == 0:
            if not data:
                yield ()
            return
        for size in range(len(data) - num_tokens + 1, 0, -1):
            token_id = self._ids_of_bytes.get(data[:size])
            if token_id is not None:
                for rest in self._splits(data[size:], num_tokens - 1):
                    yield (token_id, *rest)


def hidden_token_ids(vocabulary: Vocabulary, text: str, shown: Sequence[int], num_hidden: int) -> tuple[int, ...]:
    """The `num_hidden` tokens that came before `shown` and made `text` together with them.

    Where several splits spell the same bytes, the one with the longest tokens first is taken: the text is right in any
    case. Empty where no split exists.
    """
    tail = b"".join(map(vocabulary.shown_bytes, shown))
    data = text.encode()
    if not data.endswith(tail):
        return ()
    return vocabulary.split(data[: len(data) - len(tail)], num_hidden) or ()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _decode_byte_level(token: bytes) -> bytes:
    table = _byte_of_character()
    text = token.decode("utf-8", "replace")
    if all(character in table for character in text):
        return bytes(table[character] for character in text)
    return token  # added tokens are spelled plainly


def _decode_sentence_piece(token: bytes) -> bytes:
    if len(token) == 6 and token.startswith(b"<0x") and token.endswith(b">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581".encode(), b" ")
