"""What a continuing engine owes its client: nothing twice, nothing left out, the end where it belongs."""

import itertools

import pytest

from cluster.engine import Delivered, GenerationRequest, SamplingParams
from cluster.engines.resumption import catch_up, decode_pieces, remaining_sampling
from cluster.engines.stop_strings import StopMatcher
from cluster.errors import CannotContinue
from tests.chaos.hash_engine import END, HashAnswer

STOPS = ("STOP", " the of", "é.")


def resume(pieces: list[str], num_shown: int, *, stop: tuple[str, ...] = (), max_tokens: int = 99, ends: object = ()):
    delivered = Delivered(tuple(range(len(pieces))), num_shown)
    return catch_up(pieces, StopMatcher(stop), delivered, max_tokens, ends)  # type: ignore[arg-type]


def test_what_was_shown_is_not_due_again() -> None:
    assert resume(["Hel", "lo ", "you"], 6) == ("you", None)
    assert resume(["Hel", "lo"], 5) == ("", None)


def test_what_may_become_a_stop_string_stays_held_back() -> None:
    assert resume(["Hello S", "T"], 6, stop=("STOP",)) == ("", None)
    assert resume(["Hello S", "T"], 3, stop=("STOP",)) == ("lo ", None)


def test_a_stop_string_that_was_complete_ends_the_answer() -> None:
    assert resume(["Hello S", "TOP more"], 6, stop=("STOP",)) == ("", "stop")


def test_the_limit_and_an_end_token_end_it_with_the_text_that_was_held_back() -> None:
    assert resume(["Hello S", "T"], 6, stop=("STOP",), max_tokens=2) == ("ST", "length")
    assert resume(["Hello S", "T"], 6, stop=("STOP",), ends={1}) == ("ST", "stop")


def test_held_back_text_that_was_shown_means_that_the_answer_had_ended() -> None:
    assert resume(["Hello S", "T"], 8, stop=("STOP",)) == ("", "stop")


def test_tokens_that_do_not_spell_what_was_shown_are_refused() -> None:
    with pytest.raises(CannotContinue, match="spell 5 characters, but 6 were shown"):
        resume(["Hello"], 6)


def test_characters_are_put_together_over_tokens_and_half_a_one_is_refused() -> None:
    whole = "é😀".encode()
    assert list(decode_pieces([whole[:1], whole[1:3], whole[3:]])) == ["", "é", "😀"]
    with pytest.raises(CannotContinue, match="middle of a character"):
        list(decode_pieces([whole[:4]]))


def test_the_rest_gets_the_rest_of_the_tokens_and_a_seed_of_its_own() -> None:
    sampling = SamplingParams(seed=7, temperature=1.0)
    seeds = {remaining_sampling(sampling, Delivered((0,) * n, 0), 50).seed for n in range(20)}
    assert len(seeds) == 20
    rest = remaining_sampling(sampling, Delivered((1, 2), 0), 50)
    assert (rest.max_tokens, rest.temperature) == (48, 1.0)
    assert remaining_sampling(sampling, Delivered((), 0), 50).seed == 7
    assert remaining_sampling(SamplingParams(), Delivered((1,), 0), 50).seed is None


@pytest.mark.parametrize("number", range(12))
def test_a_hash_answer_is_the_same_wherever_it_is_taken_up(number: int) -> None:
    """Every cut of an answer, at every amount of text that may have been shown by then."""
    request = GenerationRequest("r", prompt_text=f"p{number}", sampling=SamplingParams(max_tokens=60, stop=STOPS))
    whole = HashAnswer(request)
    steps = [(0, "")]
    token_ids: list[int] = []
    while whole.finish_reason is None:
        chunk = whole.next(1)
        token_ids += chunk.token_ids
        steps.append((len(token_ids), steps[-1][1] + chunk.text))
    text = steps[-1][1]
    for (num_tokens, shown), behind in itertools.product(steps[1:], (0, 1, 3)):
        delivered = Delivered(tuple(token_ids[:num_tokens]), max(0, len(shown) - behind))
        rest = HashAnswer(
            GenerationRequest("r", prompt_text=f"p{number}", sampling=request.sampling, delivered=delivered)
        )
        caught_up = rest.catch_up()
        assert caught_up is not None
        said = shown[: delivered.num_characters] + caught_up.text
        while rest.finish_reason is None:
            said += rest.next(2).text
        assert said == text
        assert rest.finish_reason == whole.finish_reason
        assert rest.last().usage == whole.last().usage
    assert END not in token_ids[:-1]
