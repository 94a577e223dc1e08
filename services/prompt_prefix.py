"""Fingerprints of prompts, to find the replica that has computed the beginning of one before. Pure.

A prompt is cut into blocks of bytes, also at the end of each message, and the hash of a block covers all before it
(as vLLM's prefix cache hashes blocks of tokens). So two prompts have as many leading hashes in common as they have
leading blocks, without a tokenizer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

BLOCK_BYTES = 512
MAX_BLOCKS = 512
"""What lies behind is not looked at: two prompts that are alike for so long go to one replica in any case."""
_HASH_BYTES = 8
# Characters, or bytes of token ids, that are encoded in one go.
_PART = 8192


class Block(NamedTuple):
    """`hash` covers the prompt up to its end, `num_bytes` are its own."""

    hash: bytes
    num_bytes: int


Fingerprint = tuple[Block, ...]


def fingerprint(body: Mapping[str, Any]) -> Fingerprint:
    """Of a `/generate` body."""
    return tuple(blocks_of(body))


def blocks_of(body: Mapping[str, Any]) -> Iterator[Block]:
    """The same block by block: between two of them little is computed, however long the prompt is."""
    before = b""
    num_blocks = 0
    for part in _parts(body):
        for start in range(0, len(part), BLOCK_BYTES):
            data = part[start : start + BLOCK_BYTES]
            before = blake2b(before + data, digest_size=_HASH_BYTES).digest()
            yield Block(before, len(data))
            num_blocks += 1
            if num_blocks == MAX_BLOCKS:
                return


def _parts(body: Mapping[str, Any]) -> Iterator[bytes]:
    """What the prompt begins with comes first: tools stand in the template's head."""
    if body.get("prompt_text") is not None:
        yield from _encoded(body["prompt_text"])
    elif body.get("prompt_token_ids") is not None:
        for start in range(0, len(body["prompt_token_ids"]), _PART // 4):
            ids = body["prompt_token_ids"][start : start + _PART // 4]
            yield struct.pack(f">{len(ids)}I", *(token_id & 0xFFFFFFFF for token_id in ids))
    else:
        for tool in body.get("tools") or ():
            yield from _encoded(json.dumps(tool, ensure_ascii=False))
        for message in body.get("messages") or ():
            content = message.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            yield from _encoded(f"{message.get('role')}\n{text[: MAX_BLOCKS * BLOCK_BYTES]}\n")


def _encoded(text: str) -> Iterator[bytes]:
    for start in range(0, len(text), _PART):
        yield text[start : start + _PART].encode("utf-8", "surrogatepass")
