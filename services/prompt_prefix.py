"""Fingerprints of prompts, to find the replica that has computed the beginning of one before. Pure.

A prompt is cut into blocks of bytes, also at the end of each message, and the hash of a block covers all before it
(as vLLM's prefix cache hashes blocks of tokens). So two prompts have as many leading hashes in common as they have
leading blocks, without a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

BLOCK_BYTES = 512
MAX_BLOCKS = 512
"""What lies behind is not looked at: two prompts that are alike for so long go to one replica in any case."""
_HASH_BYTES = 8


class Block(NamedTuple):
    """`hash` covers the prompt up to its end, `num_bytes` are its own."""

    hash: bytes
    num_bytes: int


Fingerprint = tuple[Block, ...]


def size_of(body: Mapping[str, Any]) -> int:
    """Roughly the number of characters of a `/generate` body's prompt, at hardly any cost."""
    if body.get("prompt_text") is not None:
        return len(body["prompt_text"])
    if body.get("prompt_token_ids") is not None:
        return 4 * len(body["prompt_token_ids"])
    return sum(len(message.get("content") or "") for message in body.get("messages") or ())


def fingerprint(body: Mapping[str, Any]) -> Fingerprint:
    """Of a `/generate` body."""
    blocks: list[Block] = []
    before = b""
    for part in _parts(body):
        for start in range(0, len(part), BLOCK_BYTES):
            data = part[start : start + BLOCK_BYTES]
            before = blake2b(before + data, digest_size=_HASH_BYTES).digest()
            blocks.append(Block(before, len(data)))
            if len(blocks) == MAX_BLOCKS:
                return tuple(blocks)
    return tuple(blocks)


def _parts(body: Mapping[str, Any]) -> Iterable[bytes]:
    """What the prompt begins with comes first: tools stand in the template's head."""
    if body.get("prompt_text") is not None:
        yield body["prompt_text"].encode("utf-8", "surrogatepass")
    elif body.get("prompt_token_ids") is not None:
        yield b"".join(token_id.to_bytes(4, "big") for token_id in body["prompt_token_ids"])
    else:
        if body.get("tools"):
            yield json.dumps(body["tools"], ensure_ascii=False).encode("utf-8", "surrogatepass")
        for message in body.get("messages") or ():
            content = message.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            yield f"{message.get('role')}\n{text}\n".encode("utf-8", "surrogatepass")
