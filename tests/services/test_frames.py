"""Frames survive any cut of the byte stream, and damage is noticed."""

import struct

import pytest

from services.frames import (
    KEEP_ALIVE_FRAME,
    FrameDecoder,
    FrameError,
    FrameKind,
    encode_end,
    encode_error,
    encode_frame,
)

STREAM = (
    encode_frame(FrameKind.DATA, b"data: {}\n\n", (1, 2, 4_294_967_295), 5)
    + encode_frame(FrameKind.DATA, "é😀".encode())
    + KEEP_ALIVE_FRAME
    + encode_frame(FrameKind.DATA, b"", (7,))
    + encode_end("stop", {"num_prompt_tokens": 3})
)


def test_frames_come_back_as_they_were_coded() -> None:
    decoder = FrameDecoder()
    frames = decoder.feed(STREAM)
    decoder.finish()
    assert [frame.kind for frame in frames] == [0, 0, 3, 0, 1]
    assert frames[0].token_ids == (1, 2, 4_294_967_295)
    assert frames[0].payload == b"data: {}\n\n"
    assert frames[1].payload.decode() == "é😀"
    assert frames[3].token_ids == (7,)
    assert [frame.num_characters for frame in frames] == [5, 0, 0, 0, 0]
    assert frames[4].json() == {"finish_reason": "stop", "usage": {"num_prompt_tokens": 3}}


@pytest.mark.parametrize("piece", [1, 2, 5, 11, 12, 13, 31])
def test_any_cut_of_the_stream_gives_the_same_frames(piece: int) -> None:
    decoder = FrameDecoder()
    frames = [f for at in range(0, len(STREAM), piece) for f in decoder.feed(STREAM[at : at + piece])]
    assert frames == FrameDecoder().feed(STREAM)


def test_a_cut_last_frame_is_noticed() -> None:
    decoder = FrameDecoder()
    decoder.feed(STREAM[:-1])
    with pytest.raises(FrameError, match="ended inside a frame"):
        decoder.finish()


@pytest.mark.parametrize("header", [b"HTTP/1.1 200 OK\r\n", struct.pack(">IIII", 0, 1 << 30, 0, 0)])
def test_bytes_that_are_no_frames_are_refused(header: bytes) -> None:
    with pytest.raises(FrameError, match="Not a frame header"):
        FrameDecoder().feed(header)


def test_an_error_frame_says_all_four_fields() -> None:
    (frame,) = FrameDecoder().feed(encode_error("server_error", "it broke", code="engine_failed"))
    assert frame.kind is FrameKind.ERROR
    assert frame.json() == {"type": "server_error", "message": "it broke", "code": "engine_failed", "param": None}
