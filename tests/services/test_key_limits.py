"""Refusals and headers in OpenAI's words."""

import pytest

from services.key_limits import duration, refused, standing_headers
from services.limits import Limits, Reason, Refusal, Standing


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (60, "1m0s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_does_and_never_too_short(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_headers_tell_the_limits_that_there_are() -> None:
    standing = Standing(Limits(None, 1000, 3), remaining_tokens=988, tokens_reset_s=12.5)
    assert standing_headers(standing) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "988",
        "x-ratelimit-reset-tokens": "12.5s",
    }
    assert standing_headers(Standing(Limits(concurrent_streams=3))) == {}


@pytest.mark.parametrize("reason", ["requests", "tokens", "concurrent_streams"])
def test_a_refusal_says_limit_used_requested_and_when_to_come_back(reason: Reason) -> None:
    error = refused(Refusal(reason, limit=10, used=9, requested=2, retry_after_s=3.01))
    assert (error.status, error.type, error.code, error.retry_after_s) == (429, reason, "rate_limit_exceeded", 4)
    assert "limit 10, used 9, requested 2. Try again in 4 s." in error.message


def test_a_wait_of_no_time_is_told_as_a_second() -> None:
    assert refused(Refusal("requests", 1, 1, 1, retry_after_s=0.001)).retry_after_s == 1
