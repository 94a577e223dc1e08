"""What to search for when a question leans on the turns before it.

By rule, without a model: a small one rewrites badly, and a wrong rewrite is worse than none. "And in Italy?" takes the
place of "in Germany" in the question before it, "and for fathers?" is put behind that question; a question with a
pronoun ("how long is it?") is searched together with the one before. Any other question is searched as it stands, and
together with the one before only where nothing was found for it alone. The client is told what was searched for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rag.language import STOP_WORDS, content_words, words
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
_OPENING = re.compile(
    r"\s*(?:and|but|or|so|und|aber|oder|et|mais|ou|e|ma|o|y|pero|¿\s*y|¿)?\s*"
    r"(?:what about|how about|was ist mit|wie ist es mit|wie ist es|wie steht es mit|qu'en est-il|che dire|qué hay de|"
    r"qué pasa con|qué tal)?"
    r"\s+(?=\S)",
    re.IGNORECASE,
)  # fmt: skip
_QUESTION_WORD_LIST = """
    who what when where why how which whose whom is are was were do does did can could will would wer was wann wo
    warum wie welche welcher welches wieso ist sind war hat kann qui que quand où pourquoi comment quel quelle quels
    quelles combien est sont chi che cosa quando dove perché come quale quali quanto quanti quanta quante è sono
    quién qué cuándo dónde cómo cuál cuáles cuánto cuántos cuánta cuántas es son
"""
_QUESTION_WORDS = frozenset(_QUESTION_WORD_LIST.split())
_PREPOSITION_GROUPS = (
    "in im at en dans nel nella nell nello nei à au aux",
    "for für pour per para",
    "of von vom du des di del della dello dei degli delle",
    "from aus seit since depuis da dal dalla desde",
    "with mit avec con",
    "on auf am sur su sul sulla sobre",
    "to nach zu zum zur vers a al alla",
    "by bei beim durch par chez por",
    "during während pendant durante",
    "after nach après dopo después",
    "before vor avant prima antes",
)
_GROUPS = {word: group for group, listed in enumerate(_PREPOSITION_GROUPS) for word in listed.split()}
_ARTICLE_LIST = """
    the a an der die das den dem des ein eine einen einem le la les l un une il lo i gli uno una el los las
"""
_ARTICLES = frozenset(_ARTICLE_LIST.split())
_ARTICLE = re.compile(r"^(?:(?:the|la|le|les|der|die|das|il|lo|el|los|las)\s+|l['’])(?=[A-ZÀ-Þ])")
_WORD = re.compile(r"[^\W_]+")


def search_queries(messages: Sequence[Message]) -> list[str]:
    """What to search for, in the order to try; at least one text unless the last question is empty."""
    questions = [text for message in messages if message.get("role") == "user" and (text := text_of(message).strip())]
    if not questions:
        return []
    alone = questions[-1]
    if len(questions) == 1:
        return [alone]
    before = _standing(questions[:-1])
    together = f"{before}\n{alone}"
    if not refers_back(alone):
        return [alone, together]
    return [complete(before, alone) or together, alone]


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


def complete(before: str, follow_up: str) -> str | None:
    """The question before with the part of it exchanged or added that the follow-up names; None where it names none."""
    part = _named_part(follow_up)
    if part is None:
        return None
    spoken = list(words(part))
    name = _ARTICLE.sub("", part)
    if spoken[0] in _GROUPS:
        part = part[0].lower() + part[1:]
        place = _phrase_like(before, spoken[0])
        if place is not None:
            return before[: place[0]] + part + before[place[1] :]
    elif (place := _only_name(before)) is not None and name[0].isupper():
        return before[: place[0]] + name + before[place[1] :]
    ending = re.search(r"[\s?!.]*\Z", before)
    end = ending.start() if ending else len(before)
    return f"{before[:end]} {part}{before[end:] or '?'}"


def _standing(questions: Sequence[str]) -> str:
    """The last of the questions as it would be asked alone."""
    standing = questions[0]
    for question in questions[1:]:
        if not refers_back(question):
            standing = question
        else:
            standing = complete(standing, question) or f"{standing}\n{question}"
    return standing


def _named_part(follow_up: str) -> str | None:
    """What a follow-up without a verb of its own names: `in Italy` of "and in Italy?"."""
    opening = _OPENING.match(f" {follow_up}")
    rest = (f" {follow_up}"[opening.end() :] if opening else follow_up).strip().rstrip("?!. ").strip()
    spoken = list(words(rest))
    if not spoken or spoken[0] in _QUESTION_WORDS or any(word in _REFERRING for word in spoken):
        return None
    return rest if any(word not in _GROUPS and word not in _ARTICLES for word in spoken) else None


def _phrase_like(question: str, preposition: str) -> tuple[int, int] | None:
    """The last phrase of the question that begins with such a preposition: up to the next function word or sign."""
    tokens = list(_WORD.finditer(question))
    for index in range(len(tokens) - 1, -1, -1):
        if index and _GROUPS.get(tokens[index].group().lower()) == _GROUPS[preposition]:
            end = index
            for later in range(index + 1, len(tokens)):
                if not _goes_on(question, tokens, index, later):
                    break
                end = later
            return (tokens[index].start(), tokens[end].end()) if end > index else None
    return None


def _goes_on(question: str, tokens: Sequence[re.Match[str]], start: int, later: int) -> bool:
    """Whether a phrase from `start` takes in the token: an article only at its beginning, after a name only names."""
    previous, token = tokens[later - 1], tokens[later]
    if question[previous.end() : token.start()].strip(" '’"):
        return False
    if later == start + 1:
        return True
    after_name = previous.group()[0].isupper() and not token.group()[0].isupper()
    return not after_name and not _is_function_word(token.group().lower())


def _only_name(question: str) -> tuple[int, int] | None:
    """The one run of capitalised words inside the question, if there is just one."""
    runs = [found.span() for found in re.finditer(r"(?<=\S\s)[A-ZÀ-Þ][\w'’-]*(?: [A-ZÀ-Þ][\w'’-]*)*", question)]
    return runs[0] if len(runs) == 1 else None


def _is_function_word(word: str) -> bool:
    return any(word in stop_words for stop_words in STOP_WORDS.values())
