"""Citations that hold: which passage supports which sentence of an answer, and where exactly it says so.

Marks `[n]` that a model wrote stay where passage n exists and does not say something else; all others are taken out.
Sentences without a mark get one where a passage supports them (`rag.support` says when). Sentences that state something
and have no support are named. The quote is cut from the passage letter by letter, so its span is exact in the document
version. Nothing here asks a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag.language import content_words
from rag.sentences import Span, split_sentences
from rag.support import ReadPassage, ReadSentence, judge, language_of, share
from rag.types import Citation, Passage

_MARK = re.compile(r"[ \t]*[\[【](\d{1,3}(?:\s*[,;]\s*\d{1,3})*)[\]】]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_NO_CLAIM = re.compile(r"\s*#{1,6}\s|\s*(\*\*|__).+\1:?\s*\Z|.*\?[\s\"'»”’)*_]*\Z", re.DOTALL)
"""Headings and questions: they state nothing that could be supported."""


@dataclass(frozen=True, slots=True)
class CitedPassage:
    """A citation with the places of the answer (character spans of the final text) that it supports."""

    citation: Citation
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CitedAnswer:
    """The answer with verified marks. `num_dropped_marks` counts what the model cited and no passage carries;
    `unsupported` are the places (character spans of `text`) of sentences that state something which no passage says."""

    text: str
    citations: tuple[CitedPassage, ...]
    num_dropped_marks: int
    unsupported: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Mark:
    start: int
    end: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Support:
    """Passage `number` (from 1) carries a sentence by `overlap` of its words; `quote` is inside the passage's text."""

    number: int
    overlap: float
    quote: Span


def answer_sentences(answer: str) -> list[str]:
    """The sentences that `cite` judges, without marks, in its order: what to embed for `cosines`."""
    plain, _ = take_out_marks(answer)
    return [plain[span.start : span.end] for span in split_sentences(plain)]


def needs_meaning(answer: str, passages: Sequence[Passage]) -> bool:
    """Whether a sentence of the answer and a passage are in different languages: only there `cosines` count."""
    spoken = {ReadSentence(sentence).language for sentence in answer_sentences(answer)} - {None}
    return any(spoken - {language} for passage in passages if (language := language_of(passage)))


def passage_sentences(passage: Passage) -> list[str]:
    """What to embed of a passage for `cosines`; at least one text."""
    text = passage.chunk.text
    return [text[span.start : span.end] for span in split_sentences(text)] or [text]


def count_claims(answer: str) -> int:
    """Sentences that state something, which a passage should therefore say."""
    return sum(_states_something(sentence) for sentence in answer_sentences(answer))


def cite(
    answer: str,
    passages: Sequence[Passage],
    *,
    question: str = "",
    collection_names: Mapping[str, str] | None = None,
    cosines: npt.NDArray[np.float32] | None = None,
    unusable: Collection[int] = (),
) -> CitedAnswer:
    """Verify and attach citations. Passage n is `passages[n - 1]`, as the prompt numbered them. `cosines` has a row
    for each of `answer_sentences(answer)` and a column for each passage: the cosine with the nearest of its
    `passage_sentences`. Passages whose number is `unusable` are cited for nothing."""
    plain, marks = take_out_marks(answer)
    sentences = split_sentences(plain)
    texts = {number: ReadPassage(passage) for number, passage in enumerate(passages, start=1) if number not in unusable}
    chosen: list[list[_Support]] = []
    for row, span in enumerate(sentences):
        sentence = plain[span.start : span.end]
        wanted = [number for mark in marks if span.start < mark.start <= span.end for number in mark.numbers]
        meaning = None if cosines is None else cosines[row]
        chosen.append(_choose(sentence, texts, wanted, question, meaning))
    kept = sum(len({support.number for support in supports}) for supports in chosen)
    text, spans = _write_marks(plain, sentences, [[s.number for s in supports] for supports in chosen])
    citations = _citations(chosen, spans, passages, collection_names or {})
    num_marks = sum(len(mark.numbers) for mark in marks)
    unsupported = tuple(
        place
        for place, span, supports in zip(spans, sentences, chosen, strict=True)
        if not supports and _states_something(plain[span.start : span.end])
    )
    return CitedAnswer(text, citations, max(0, num_marks - kept), unsupported)


def take_out_marks(text: str) -> tuple[str, list[_Mark]]:
    """The text without `[n]` marks, and the marks with their places in that text. Brackets in code are no marks."""
    code = [match.span() for match in _CODE.finditer(text)]
    pieces: list[str] = []
    marks: list[_Mark] = []
    copied = length = 0
    for match in _MARK.finditer(text):
        if any(start <= match.start() < end for start, end in code) or text[match.end() : match.end() + 1] in (
            "(",
            ":",
        ):
            continue
        pieces.append(text[copied : match.start()])
        length += match.start() - copied
        end = _end_of_lone_mark(text, match)
        numbers = tuple(dict.fromkeys(int(number) for number in re.findall(r"\d+", match.group(1))))
        marks.append(_Mark(length, length, numbers))
        copied = end
    pieces.append(text[copied:])
    return "".join(pieces), marks


def _end_of_lone_mark(text: str, match: re.Match[str]) -> int:
    """Where a mark ends; one that has a line for itself takes the line along."""
    rest = re.match(r"[ \t]*\n", text[match.end() :])
    begins_line = match.start() == 0 or text[match.start() - 1] == "\n"
    return match.end() + rest.end() if rest and begins_line else match.end()


def _states_something(sentence: str) -> bool:
    return bool(content_words(sentence)) and not _NO_CLAIM.match(sentence)


def _choose(
    sentence: str,
    passages: Mapping[int, ReadPassage],
    marked: Sequence[int],
    question: str,
    meaning: npt.NDArray[np.float32] | None,
) -> list[_Support]:
    """The model's own marks as far as they hold; otherwise the one passage that supports the sentence best."""
    read = ReadSentence(sentence, question)
    if not read.wanted:
        return []
    is_claim = not _NO_CLAIM.match(sentence)
    candidates: list[tuple[float, _Support]] = []
    for number, passage in passages.items():
        cosine = 0.0 if meaning is None else float(meaning[number - 1])
        # A model that cites may have drawn on the whole passage; what the server attaches stands close together.
        is_marked = number in marked
        verdict = judge(read, passage, cosine=cosine, is_marked=is_marked)
        if not verdict.is_supported:
            continue
        support = _Support(number, verdict.overlap, verdict.quote)
        if is_marked:
            candidates.append((2.0 + verdict.overlap, support))
        elif is_claim:
            nearness = 0.3 * share(read.asked, passage.all_forms) + 0.5 * cosine
            candidates.append((verdict.overlap + nearness - 1.0, support))
    own = [support for value, support in candidates if value >= 2.0]
    if own:
        return own
    return [max(candidates, key=lambda candidate: candidate[0])[1]] if candidates else []


def _write_marks(
    plain: str, sentences: Sequence[Span], numbers: Sequence[Sequence[int]]
) -> tuple[str, list[tuple[int, int]]]:
    """Put ` [n]` before each sentence's closing punctuation; give the sentences' spans in the new text."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    copied = length = 0
    for span, marks in zip(sentences, numbers, strict=True):
        place = span.end - _closing_length(plain[span.start : span.end])
        marked = "".join(f" [{number}]" for number in dict.fromkeys(marks))
        piece = plain[copied : span.start]
        start = length + len(piece)
        piece += plain[span.start : place] + marked + plain[place : span.end]
        pieces.append(piece)
        length += len(piece)
        spans.append((start, length))
        copied = span.end
    pieces.append(plain[copied:])
    return "".join(pieces), spans


def _closing_length(sentence: str) -> int:
    match = re.search(r"[.!?…:;,]+$", sentence)
    return len(match.group()) if match else 0


def _citations(
    chosen: Sequence[Sequence[_Support]],
    spans: Sequence[tuple[int, int]],
    passages: Sequence[Passage],
    collection_names: Mapping[str, str],
) -> tuple[CitedPassage, ...]:
    """One citation a passage; its quote runs from the first to the last thing that the answer uses of it."""
    by_number: dict[int, list[tuple[_Support, tuple[int, int]]]] = {}
    for supports, span in zip(chosen, spans, strict=True):
        for support in supports:
            by_number.setdefault(support.number, []).append((support, span))
    result: list[CitedPassage] = []
    for number, uses in sorted(by_number.items()):
        passage = passages[number - 1]
        start = min(support.quote.start for support, _ in uses)
        end = max(support.quote.end for support, _ in uses)
        citation = make_citation(number, passage, start, end, collection_names)
        result.append(CitedPassage(citation, tuple(span for _, span in uses)))
    return tuple(result)


def make_citation(number: int, passage: Passage, start: int, end: int, collection_names: Mapping[str, str]) -> Citation:
    """A citation of `passage.chunk.text[start:end]`."""
    chunk = passage.chunk
    return Citation(
        number=number,
        document_id=chunk.document_id,
        version_id=chunk.version_id,
        document_name=chunk.document_name,
        collection=collection_names.get(chunk.collection_id, chunk.collection_id),
        page=chunk.page,
        start=chunk.start + start,
        end=chunk.start + end,
        quote=chunk.text[start:end],
        score=passage.score,
    )
