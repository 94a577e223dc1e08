"""What to search for when a question leans on the turns before it.

Without a model: a small one rewrites badly, and a wrong rewrite is worse than none. A question that refers back ("and
for fathers?", "how long is it?") is searched together with the one before it; any other is searched as it stands, and
together with the one before only where nothing was found for it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from rag.language import content_words, words
from services.chat_types import Message
from services.tools.prompting import text_of

_FEW_WORDS = 2
_REFERRING_WORDS = """
    it its they them their that this those these he she his her there
    il elle ils elles lui leur celui celle cela ça ceci
    esso essa essi lei loro questo quello questa quella
    es er sie ihm ihr ihnen das dies dieser diese dieses davon dafür damit
    eso esto ese esa este esta ellos ellas él
"""
_REFERRING = frozenset(_REFERRING_WORDS.split())
_BEGINNINGS = frozenset(["and", "but", "et", "mais", "e", "ma", "und", "aber", "y", "pero"])


def search_queries(messages: Sequence[Message]) -> list[str]:
    """What to search for, in the order to try; at least one text unless the last question is empty."""
    questions = [text for message in messages if message.get("role") == "user" and (text := text_of(message).strip())]
    if not questions:
        return []
    alone = questions[-1]
    if len(questions) == 1:
        return [alone]
    together = f"{questions[-2]}\n{alone}"
    return [together, alone] if refers_back(alone) else [alone, together]


def refers_back(question: str) -> bool:
    """Does a question make sense only after another one?"""
    spoken = list(words(question))
    if not spoken:
        return False
    return (
        spoken[0] in _BEGINNINGS
        or len(content_words(question)) < _FEW_WORDS
        or any(word in _REFERRING for word in spoken)
    )
