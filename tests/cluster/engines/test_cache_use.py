"""The KV cache holds what running requests have: prompts, and tokens as they come; nothing of those that ended."""

import pytest

from cluster.engines.cache_use import CacheUse


def test_requests_are_added_up_and_leave_nothing_behind() -> None:
    use = CacheUse(1000)
    with use.hold(100) as first:
        first.add(1)
        with use.hold(50) as second:
            second.add(3)
            first.add(1)
            assert (use.num_tokens, use.max_tokens) == (155, 1000)
        assert use.num_tokens == 102
    assert use.num_tokens == 0


def test_a_request_that_fails_leaves_nothing_behind_either() -> None:
    use = CacheUse(1000)
    with pytest.raises(RuntimeError), use.hold(100) as held:
        held.add(5)
        raise RuntimeError
    assert use.num_tokens == 0
