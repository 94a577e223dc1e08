"""Labelled pairs for the measure of support: the written ones, and those that rules make from the question sets.

    python -m tests.support_pairs              writes tests/data/citation-support/made.jsonl anew
    python -m tests.support_pairs --cosines    writes cosines.json beside it anew, with the embedding model

Rules (the same files give the same pairs): from each question set, questions in their order; the sentence of the gold
paragraph that holds the answer, between 8 and 40 words; each sentence makes at most one pair of each kind, and each
kind stops at `PER_KIND` pairs a language. Supported: the sentence itself; its beginning up to a comma; in another
language the whole paragraph that it was translated from. Unsupported: one number, unit or name of it exchanged, a
negation put in, its first and last name exchanged, a sentence of another article; in another language the paragraph
beside the one that it was translated from.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from rag.citations import passage_sentences
from rag.sentences import split_sentences
from rag.support import ReadPassage, ReadSentence, judge
from rag.types import Embedder, Passage, StoredChunk

DATA = Path(__file__).parent / "data"
SETS = DATA / "multilingual-qa-mini"
FOLDER = DATA / "citation-support"
LANGUAGES = ("en", "de", "es", "fr", "it")
PER_KIND = 7
_WORDS = (8, 40)

_NUMBER = re.compile(r"(?<![\w.,])\d[\d.,]*\d|(?<![\w.,])\d(?![\w.,]*\d)")
_NAME = re.compile(r"(?<=[\w,] )[A-ZÀ-Þ][\w'’-]+(?: [A-ZÀ-Þ][\w'’-]+)*")
_UNITS = {
    "en": {"million": "billion", "billion": "million", "years": "months", "miles": "kilometres", "percent": "dollars"},
    "de": {"Millionen": "Milliarden", "Milliarden": "Millionen", "Jahre": "Monate", "Jahren": "Monaten"},
    "es": {"millones": "billones", "años": "meses", "kilómetros": "metros", "días": "semanas"},
    "fr": {"millions": "milliards", "milliards": "millions", "ans": "mois", "mètres": "kilomètres"},
    "it": {"milioni": "miliardi", "miliardi": "milioni", "anni": "mesi", "metri": "chilometri", "giorni": "settimane"},
}  # fmt: skip
_NEGATIONS = {
    "en": (r"\b(is|was|were|are|had|could|would|can)\b", r"\1 not"),
    "de": (r"\b(ist|war|waren|wurde|wurden|sind|hatte)\b", r"\1 nicht"),
    "es": (r"\b(es|fue|era|fueron|son|tiene|había|eran)\b", r"no \1"),
    "fr": (r"\b(sont|fut|furent|peut|peuvent|doit|reste)\b", r"ne \1 pas"),
    "it": (r"\b(è|era|fu|furono|sono|erano|può)\b", r"non \1"),
}
_HAS_NEGATION = {
    "en": r"\b(not|no|never|none|neither|nor|without|only)\b|n't",
    "de": r"\b(nicht|kein\w*|nie|ohne|weder|nur)\b",
    "es": r"\b(no|nunca|ningun\w*|sin|ni|solo|sólo|jamás)\b",
    "fr": r"\b(ne|pas|jamais|aucun\w*|sans|ni|rien|que)\b|n'",
    "it": r"\b(non|mai|nessun\w*|senza|né|solo)\b",
}


@dataclass(frozen=True)
class Pair:
    """Does `passage` (the id of a paragraph) say `sentence`?"""

    language: str
    passage: str
    kind: str
    supported: bool
    sentence: str


def read_written(name: str) -> list[tuple[Pair, str]]:
    """Pairs of a file of written ones, with their passages' texts."""
    texts = {entry["_id"]: entry for entry in _lines(FOLDER / "passages.jsonl")}
    written = []
    for line in (FOLDER / name).read_text("utf-8").splitlines()[1:]:
        passage, kind, supported, sentence = line.split("\t")
        entry = texts[passage]
        written.append((Pair(entry["language"], passage, kind, supported == "1", sentence), str(entry["text"])))
    return written


def read_made() -> list[tuple[Pair, str]]:
    return with_texts([Pair(**entry) for entry in _lines(FOLDER / "made.jsonl")])


def read_cosines(name: str) -> list[float]:
    """Of `written`, `held-out` or `made`, in their order: each sentence with the nearest one of its passage."""
    cosines: dict[str, list[float]] = json.loads((FOLDER / "cosines.json").read_text("utf-8"))
    return cosines[name]


async def compute_cosines(pairs: Iterable[tuple[Pair, str]], embedder: Embedder) -> list[float]:
    """What the product hands to the measure for each pair."""
    cosines = []
    for pair, text in pairs:
        sentences = passage_sentences(as_passage(pair, text))
        vectors = await embedder.embed_passages([pair.sentence, *sentences])
        cosines.append(round(float((vectors[1:] @ vectors[0]).max()), 3))
    return cosines


def with_texts(pairs: Iterable[Pair]) -> list[tuple[Pair, str]]:
    """Pairs about paragraphs of the question sets with these."""
    paragraphs = {language: _paragraphs(language) for language in LANGUAGES}
    return [(pair, paragraphs[_language_of(pair.passage)][pair.passage][1]) for pair in pairs]


def as_passage(pair: Pair, text: str) -> Passage:
    language = _language_of(pair.passage)
    known = language if language in LANGUAGES else None
    chunk = StoredChunk("c", "col", pair.passage, "v", pair.passage, text, 0, len(text), 0, language=known)
    return Passage(chunk, 1.0)


def says(pair: Pair, text: str, cosine: float = 0.0) -> bool:
    """What the measure thinks of a pair."""
    return judge(ReadSentence(pair.sentence), ReadPassage(as_passage(pair, text)), cosine=cosine).is_supported


def by_kind(outcomes: Iterable[tuple[Pair, bool]]) -> dict[str, tuple[int, int]]:
    """(number judged rightly, number) of each kind."""
    counts: dict[str, tuple[int, int]] = {}
    for pair, is_supported in outcomes:
        right, number = counts.get(pair.kind, (0, 0))
        counts[pair.kind] = (right + (is_supported == pair.supported), number + 1)
    return counts


def precision_and_recall(outcomes: Iterable[tuple[Pair, bool]]) -> tuple[float, float]:
    """Of `supported`: how many of those that the measure supports are, and how many of those that are it supports."""
    listed = list(outcomes)
    both = sum(pair.supported and is_supported for pair, is_supported in listed)
    return both / max(1, sum(found for _, found in listed)), both / max(1, sum(pair.supported for pair, _ in listed))


def make_pairs(first: int = 0, number: int = PER_KIND) -> list[Pair]:
    """What the rules make: of each kind and language `number` pairs after the first ones."""
    pairs: list[Pair] = []
    for language in LANGUAGES:
        counts: Counter[str] = Counter()
        for pair in _pairs_of(language):
            counts[pair.kind] += 1
            if first < counts[pair.kind] <= first + number:
                pairs.append(pair)
    return pairs


def _pairs_of(language: str) -> Iterator[Pair]:
    paragraphs = _paragraphs(language)
    used: set[str] = set()
    for paragraph, sentence in _answer_sentences(language, paragraphs):
        if sentence in used:
            continue
        used.add(sentence)
        title, text = paragraphs[paragraph]
        for kind, changed in _changes(language, sentence, text):
            yield Pair(language, paragraph, kind, kind in ("copied", "clipped"), changed)
        foreign = next(other for other, (name, _) in reversed(paragraphs.items()) if name != title)
        yield Pair(language, foreign, "off-topic", False, sentence)
        if language == "en":
            for other in ("de", "es"):
                yield Pair("en", paragraph.replace("xen", f"x{other}"), "translated", True, sentence)
                beside = next(
                    (one for one, (name, _) in paragraphs.items() if name == title and one != paragraph), None
                )
                if beside:
                    yield Pair("en", beside.replace("xen", f"x{other}"), "translated-wrong", False, sentence)


def _answer_sentences(language: str, paragraphs: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    answers = {entry["_id"]: entry["answers"] for entry in _lines(SETS / language / "answers.jsonl")}
    for line in (SETS / language / "qrels.tsv").read_text("utf-8").splitlines()[1:]:
        question, paragraph, _ = line.split("\t")
        text = paragraphs[paragraph][1]
        for span in split_sentences(text):
            sentence = text[span.start : span.end]
            if any(answer in sentence for answer in answers[question]):
                if _WORDS[0] <= len(sentence.split()) <= _WORDS[1] and sentence[-1:] == ".":
                    yield paragraph, sentence
                break


def _changes(language: str, sentence: str, text: str) -> Iterator[tuple[str, str]]:
    yield "copied", sentence
    clipped = re.match(r"(.{30,}?), (?=\w)", sentence)
    if clipped and len(clipped[1].split()) >= 6:
        yield "clipped", clipped[1] + "."
    numbers = _NUMBER.findall(sentence)
    if numbers:
        yield "number", sentence.replace(numbers[0], _other_number(numbers[0], text), 1)
        moved = [number for number in _NUMBER.findall(text) if number not in sentence and number not in numbers[0]]
        if moved:
            yield "number-moved", sentence.replace(numbers[0], moved[0], 1)
    for unit, other in _UNITS[language].items():
        if re.search(rf"\d (?:\w+ )?{unit}\b", sentence) and other not in text:
            yield "unit", re.sub(rf"\b{unit}\b", other, sentence, count=1)
            break
    pattern, replacement = _NEGATIONS[language]
    if not re.search(_HAS_NEGATION[language], sentence) and re.search(pattern, sentence):
        yield "negation", re.sub(pattern, replacement, sentence, count=1)
    names = _names(sentence, language)
    others = [
        name
        for name in _names(text, language)
        if name not in sentence and not set(name.split()) & set(sentence.split())
    ]
    if names and others:
        yield "name", sentence.replace(names[0], others[0], 1)
    if len(names) >= 2 and names[0] not in names[-1] and names[-1] not in names[0] and _are_apart(sentence, names):
        yield "roles", _exchanged(sentence, names[0], names[-1])


def _names(text: str, language: str) -> list[str]:
    """Capitalised words inside a sentence; in German only such as an English paragraph has too."""
    found = list(dict.fromkeys(_NAME.findall(text)))
    if language != "de":
        return [name for name in found if len(name) > 2]
    known = _english_names()
    return [name for name in found if all(part in known for part in name.split())]


@cache
def _english_names() -> set[str]:
    return {part for _, text in _paragraphs("en").values() for name in _NAME.findall(text) for part in name.split()}


def _are_apart(sentence: str, names: list[str]) -> bool:
    between = sentence[sentence.index(names[0]) + len(names[0]) : sentence.rindex(names[-1])]
    return len(between.split()) >= 3 and not re.search(r"\b(and|und|y|et|e|or|oder|o|ou)\b", between)


def _exchanged(sentence: str, first: str, last: str) -> str:
    begin, end = sentence.index(first), sentence.rindex(last)
    return sentence[:begin] + last + sentence[begin + len(first) : end] + first + sentence[end + len(last) :]


def _other_number(number: str, text: str) -> str:
    """Another number of the same form that the paragraph does not hold."""
    for step in range(1, 10):
        last = max(index for index, character in enumerate(number) if character.isdigit())
        first = next(index for index, character in enumerate(number) if character.isdigit())
        place = first if first == last else last
        changed = number[:place] + str((int(number[place]) + step) % 10) + number[place + 1 :]
        if changed not in text and changed.strip("0"):
            return changed
    return number + "7"


@cache
def _paragraphs(language: str) -> dict[str, tuple[str, str]]:
    return {entry["_id"]: (entry["title"], entry["text"]) for entry in _lines(SETS / language / "corpus.jsonl")}


def _language_of(paragraph: str) -> str:
    return paragraph[1:3] if paragraph.startswith("x") else paragraph[:2]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


async def _write_cosines() -> None:
    from services.evaluation_index import open_serving_model
    from services.evaluation_settings import EvaluationSettings
    from services.ray_config import load_ray_config

    settings = EvaluationSettings.of(load_ray_config(DATA.parents[1] / "ray_config.yaml").app)
    files = {"written": read_written("written.tsv"), "held-out": read_written("held-out.tsv"), "made": read_made()}
    async with open_serving_model(settings.embed) as model:
        found = {name: await compute_cosines(pairs, model.embedder) for name, pairs in files.items()}
    (FOLDER / "cosines.json").write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--cosines"]:
        asyncio.run(_write_cosines())
    else:
        lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in make_pairs()]
        (FOLDER / "made.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
