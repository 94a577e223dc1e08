"""No part of a stop string is ever shown, however the text is cut."""

import itertools

import pytest

from cluster.engines.stop_strings import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.finish(), None


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "plain", "plain", None),
        (["END"], "abENDcd", "ab", "END"),
        (["END"], "abENcd", "abENcd", None),
        (["END"], "abEN", "abEN", None),
        (["aab"], "aaab", "a", "aab"),
        (["xyz", "b"], "abxyz", "a", "b"),
        (["é😀"], "aé😀b", "a", "é😀"),
        (["abc", "abcd"], "xabcd", "x", "abc"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
    ],
)
def test_every_cut_of_a_text_gives_the_same_answer(stops, text: str, shown: str, matched: str | None) -> None:
    for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        pieces, piece = [], text[:1]
        for character, cut in zip(text[1:], cuts, strict=True):
            if cut:
                pieces.append(piece)
                piece = ""
            piece += character
        got = run(stops, [*pieces, piece])
        assert got[0] == shown
        assert (got[1] is None) == (matched is None)
