"""How many copies of a model are needed, from what its copies run and hold and from what waits for them.

Pure: plain numbers in, a number and its reason out; no clock, no state. A copy is one replica, or one gang of ranks.
Upwards each limit counts as it is, downwards a stricter one, so a load that stays the same asks for no change after it
was answered. How long a wish must last before it is followed, and the bounds, are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class ScalingGoals:
    """When a model has enough copies. Raises `ValueError` for values that cannot be meant."""

    first_token_target_s: float = 2.0
    """Time to the first token that requests shall see, in seconds."""
    late_share: float = 0.1
    """Share of requests that may see a longer one before another copy is wanted."""
    slot_use: float = 0.8
    """Requests that run and wait, as a share of all slots. Above 1 they may queue, and the target decides alone."""
    cache_use: float = 0.8
    """Tokens of running and waiting requests, as a share of what the KV caches hold."""
    down_share: float = 0.7
    """A copy is given up where the others would stay below this share of every limit above."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value!r}, but a number above 0 is expected")
        for name in ("late_share", "cache_use", "down_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it is a share of at most 1")

    def stricter(self) -> ScalingGoals:
        """What the remaining copies must keep after one was given up."""
        return ScalingGoals(
            first_token_target_s=self.first_token_target_s * self.down_share,
            late_share=self.late_share,
            slot_use=self.slot_use * self.down_share,
            cache_use=self.cache_use * self.down_share,
            down_share=self.down_share,
        )


@dataclass(frozen=True, slots=True)
class CopyLoad:
    """One copy that answers, all ranks of a gang together."""

    num_requests: int
    """That run or wait in it."""
    num_slots: int
    """Requests that it runs at once."""
    num_tokens: int = 0
    """Tokens that its running requests hold in the KV cache."""
    max_tokens: int = 0
    """Tokens that its KV cache holds; 0: not known."""
    is_leaving: bool = False
    """It finishes what it has and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the endpoints know of a model, all of them together."""

    num_requests: int = 0
    """That wait for a slot, or for a copy to be there at all."""
    num_tokens: float = 0.0
    """Tokens of these: prompts as estimated, answers as the latest ones were long."""
    num_begun: int = 0
    """Requests that were sent to a copy and have not ended."""
    begun_tokens: float = 0.0
    """Tokens that these are expected to take until their end."""
    seconds_per_token: float | None = None
    """Time that a slot was taken for one token of prompt or answer; none before the first answer."""
    first_token_s: Sequence[float] = ()
    """Times to the first token of the latest requests that the present copies have answered from the beginning."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`num_copies` is before any bounds."""

    num_copies: int
    reason: str


MIN_OBSERVED = 4
"""First tokens that say something about a share."""


def decide(
    goals: ScalingGoals,
    copies: Sequence[CopyLoad],
    waiting: Waiting,
    *,
    target: int,
    max_copies: int,
    slots_before: float | None = None,
) -> Decision:
    """How many copies there shall be, where `target` is how many there shall be by the last decision.

    `slots_before` are the slots of one copy when there was one; where nobody knows, the first copy will tell.
    """
    load = _Load.of(copies, waiting, slots_before)
    if not load.num_requests:
        return Decision(0, "nothing runs and nothing waits")
    if not copies and slots_before is None:
        return Decision(max(1, target), "requests wait for the first copy")
    up = load.copies_for(goals, max_copies)
    if up.num_copies > target:
        return up
    present = sum(not copy.is_leaving for copy in copies)
    late = _share(waiting.first_token_s, goals.first_token_target_s)
    is_late = late > goals.late_share
    if is_late and present >= target > 0 and load.num_requests > present:
        reason = f"{late:.0%} of the first tokens came after more than {goals.first_token_target_s:g} s"
        return Decision(target + 1, reason)
    if is_late:
        return Decision(target, "first tokens come late, and no further copy would help")
    down = load.copies_for(goals.stricter(), max_copies)
    if down.num_copies < target:
        return Decision(down.num_copies, "fewer copies stay well below every limit")
    return Decision(target, "as many as are needed")


@dataclass(frozen=True, slots=True)
class _Load:
    """Sums, and what one copy can take."""

    num_requests: int
    unfinished_tokens: float
    cached_tokens: float
    seconds_per_token: float | None
    slots_each: float
    cache_each: float | None

    @classmethod
    def of(cls, copies: Sequence[CopyLoad], waiting: Waiting, slots_before: float | None) -> _Load:
        # What was sent to a copy is counted there and at the endpoint; the later count is the higher one.
        begun = max(sum(copy.num_requests for copy in copies), waiting.num_begun)
        staying = [copy for copy in copies if not copy.is_leaving] or list(copies)
        slots = sum(copy.num_slots for copy in staying) / len(staying) if staying else slots_before or 1.0
        knows_cache = bool(staying) and all(copy.max_tokens for copy in staying)
        return cls(
            num_requests=begun + waiting.num_requests,
            unfinished_tokens=waiting.begun_tokens + waiting.num_tokens,
            cached_tokens=sum(copy.num_tokens for copy in copies) + waiting.num_tokens,
            seconds_per_token=waiting.seconds_per_token,
            slots_each=max(1.0, slots),
            cache_each=sum(copy.max_tokens for copy in staying) / len(staying) if knows_cache else None,
        )

    def copies_for(self, goals: ScalingGoals, max_copies: int) -> Decision:
        """The smallest number that keeps every goal, or `max_copies`; the reason is what one copy less would break."""
        broken = "a request wants it"
        for num in range(1, max_copies):
            found = self._broken(goals, num)
            if found is None:
                return Decision(num, broken)
            broken = found
        return Decision(max(1, max_copies), broken)

    def _broken(self, goals: ScalingGoals, num: int) -> str | None:
        """Which goal so many copies would not keep."""
        slots = num * self.slots_each
        if self.num_requests > slots * goals.slot_use:
            return f"{self.num_requests} requests are more than {goals.slot_use:.0%} of {slots:g} slots"
        if self.cache_each is not None and self.cached_tokens > num * self.cache_each * goals.cache_use:
            return f"{self.cached_tokens:.0f} tokens are more than {goals.cache_use:.0%} of the KV cache"
        wait_s = self.wait_s(num)
        if wait_s > goals.first_token_target_s:
            return f"a new request would wait {wait_s:.1f} s for a slot"
        return None

    def wait_s(self, num: int) -> float:
        """How long one more request would wait for a slot of so many copies.

        It begins when as many of the others have ended as there are too many for it. Slots work side by side, so
        their tokens take the time of one slot divided by the number of slots.
        """
        slots = num * self.slots_each
        too_many = self.num_requests + 1 - slots
        if too_many <= 0 or self.seconds_per_token is None:
            return 0.0
        ahead = self.unfinished_tokens * min(1.0, too_many / self.num_requests)
        return ahead * self.seconds_per_token / slots


def _share(seconds: Sequence[float], limit_s: float) -> float:
    """Share of times above the limit; 0 while there are too few to say."""
    if len(seconds) < MIN_OBSERVED:
        return 0.0
    return sum(each > limit_s for each in seconds) / len(seconds)
