"""Citations that hold: which passage supports which sentence of an answer, and where exactly it says so.

Marks `[n]` that a model wrote stay where passage n exists and speaks of the same thing; all others are taken out.
Sentences without a mark get one where a passage clearly supports them: enough of the content words, every number and
every name must stand in it. Words decide, meaning (cosines, where given) only helps over paraphrase. The quote is cut
from the passage letter by letter, so its span is exact in the document version. Nothing here asks a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag.bm25 import spellings
from rag.language import STOP_WORDS, content_words, detect_language, words
from rag.sentences import Span, split_sentences
from rag.types import Citation, Passage

_MARK = re.compile(r"[ \t]*[\[【](\d{1,3}(?:\s*[,;]\s*\d{1,3})*)[\]】]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,\u00a0\u202f'’]\d+)*")
_NAME = re.compile(r"(?<!:\s)(?<=\s)[A-ZÀ-Þ][\w'’-]*\w")
_NO_CLAIM = re.compile(r"\s*#{1,6}\s|\s*(\*\*|__).+\1:?\s*\Z|.*\?[\s\"'»”’)*_]*\Z", re.DOTALL)
"""Headings and questions: they state nothing that could be supported."""

_SUPPORTED = 0.6
"""Share of a sentence's content words that a passage must hold to be cited for it."""
_SUPPORTED_WITH_MEANING = 0.35
"""The same where the cosine of sentence and passage is at least `_SAME_MEANING`."""
_SAME_MEANING = 0.86
_KEPT = 0.25
"""The same for a mark that the model itself wrote."""
_MAX_QUOTE_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class CitedPassage:
    """A citation with the places of the answer (character spans of the final text) that it supports."""

    citation: Citation
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CitedAnswer:
    """The answer with verified marks. `num_dropped_marks` counts what the model cited and no passage carries;
    `num_uncited` the sentences with content that nothing supports."""

    text: str
    citations: tuple[CitedPassage, ...]
    num_dropped_marks: int
    num_uncited: int


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


def cite(
    answer: str,
    passages: Sequence[Passage],
    *,
    question: str = "",
    collection_names: Mapping[str, str] | None = None,
    cosines: npt.NDArray[np.float32] | None = None,
) -> CitedAnswer:
    """Verify and attach citations. Passage n is `passages[n - 1]`, as the prompt numbered them. `cosines` has a row
    for each of `answer_sentences(answer)` and a column for each passage."""
    plain, marks = take_out_marks(answer)
    sentences = split_sentences(plain)
    texts = [_IndexedPassage(passage) for passage in passages]
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
    uncited = [
        span
        for span, supports in zip(sentences, chosen, strict=True)
        if not supports and content_words(plain[span.start : span.end])
    ]
    return CitedAnswer(text, citations, max(0, num_marks - kept), len(uncited))


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


@dataclass(frozen=True, slots=True)
class _Window:
    """A few sentences of a passage and what they hold, headings included."""

    span: Span
    words: set[str]


class _IndexedPassage:
    """A passage cut into sentences with the words of each."""

    def __init__(self, passage: Passage) -> None:
        text = passage.chunk.text
        self.sentences = split_sentences(text)
        self.words = [_held_by(text[span.start : span.end]) for span in self.sentences]
        self.all_words = set().union(*self.words) if self.words else set()
        self.heading_words = set().union(*map(_spelled, (*passage.chunk.headings, passage.chunk.title or "")))
        self.all_words |= self.heading_words
        self.numbers = set(_numbers(text)) | {n for heading in passage.chunk.headings for n in _numbers(heading)}
        self.all_words |= {_as_word(number) for number in self.numbers}

    def best_window(self, wanted: Sequence[set[str]]) -> _Window:
        """The run of up to three sentences that holds the most wanted words with the fewest sentences."""
        best, best_value = _Window(Span(0, 0), set()), -1.0
        for first in range(len(self.sentences)):
            held: set[str] = set()
            for last in range(first, min(first + _MAX_QUOTE_SENTENCES, len(self.sentences))):
                held = held | self.words[last]
                value = _share(wanted, held) - 0.1 * (last - first)
                if value > best_value + 1e-9:
                    span = Span(self.sentences[first].start, self.sentences[last].end)
                    best, best_value = _Window(span, held | self.heading_words), value
        return best


def _choose(
    sentence: str,
    passages: Sequence[_IndexedPassage],
    marked: Sequence[int],
    question: str,
    meaning: npt.NDArray[np.float32] | None,
) -> list[_Support]:
    """The model's own marks as far as they hold; otherwise the one passage that supports the sentence best."""
    wanted = _wanted(sentence)
    if not wanted:
        return []
    asked = _wanted(question)
    is_claim = not _NO_CLAIM.match(sentence)
    candidates: list[tuple[float, _Support]] = []
    for index, passage in enumerate(passages):
        cosine = 0.0 if meaning is None else float(meaning[index])
        window = passage.best_window(wanted + asked if len(wanted) < 3 else wanted)
        # What the server attaches must stand close together; a model may have drawn on the whole passage.
        overlap = _share(wanted, window.words)
        support = _Support(index + 1, overlap, window.span)
        agrees = _numbers_agree(sentence, passage) and _names_agree(sentence, passage)
        is_marked = index + 1 in marked and _share(wanted, passage.all_words) >= _KEPT
        if is_marked and _numbers_agree(sentence, passage):
            candidates.append((2.0 + overlap, support))
        elif is_claim and agrees and _is_supported(overlap, cosine, len(wanted)):
            nearness = 0.3 * _share(asked, passage.all_words) + 0.5 * cosine
            candidates.append((min(1.0, overlap) + nearness - 1.0, support))
    own = [support for value, support in candidates if value >= 2.0]
    if own:
        return own
    return [max(candidates, key=lambda candidate: candidate[0])[1]] if candidates else []


def _is_supported(overlap: float, cosine: float, num_words: int) -> bool:
    if num_words < 3:
        return overlap >= 1.0
    return overlap >= _SUPPORTED or (overlap >= _SUPPORTED_WITH_MEANING and cosine >= _SAME_MEANING)


def _wanted(text: str) -> list[set[str]]:
    """What a passage should hold of a text: each content word in its spellings, each number without separators."""
    by_words = [spellings(word) for word in content_words(_NUMBER.sub(" ", text))]
    return by_words + [{_as_word(number)} for number in _numbers(text)]


def _held_by(text: str) -> set[str]:
    return _spelled(text) | {_as_word(number) for number in _numbers(text)}


def _as_word(number: str) -> str:
    """Kept apart from words: `1200` may be part of a word such as `F-1200`."""
    return f"#{number}"


def _spelled(text: str) -> set[str]:
    return {form for word in words(text) for form in spellings(word)}


def _share(wanted: Sequence[set[str]], held: set[str]) -> float:
    return sum(bool(forms & held) for forms in wanted) / len(wanted) if wanted else 0.0


def _numbers(text: str) -> list[str]:
    """Numbers without their separators: `1,000`, `1.000` and `1000` are one; so are `3.5` and `3,5`. The number of a
    list item is none."""
    return [re.sub(r"\D", "", number) for number in _NUMBER.findall(re.sub(r"^\s*\d+[.)]\s", "", text))]


def _numbers_agree(sentence: str, passage: _IndexedPassage) -> bool:
    return all(number in passage.numbers for number in _numbers(sentence))


def _names_agree(sentence: str, passage: _IndexedPassage) -> bool:
    """Capitalised words inside a sentence (in German that is every noun) must be known to the passage, most of them."""
    names = [name for name in _NAME.findall(sentence) if name.lower() not in STOP_WORDS["en"]]
    known = sum(bool(_spelled(name) & passage.all_words) for name in names)
    allowed_missing = len(names) // 3 if detect_language(sentence) == "de" else 0
    return len(names) - known <= allowed_missing


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
