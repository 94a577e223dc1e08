"""Which of the five languages a text is written in, by its function words and letters, and how its words are cut down
to stems. Made for choosing stop words and stemmers, not for telling 100 languages apart: anything unsure is unknown
(`None`), and callers must have a sensible way for that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, get_args

from py_rust_stemmers import SnowballStemmer

Language = Literal["en", "fr", "it", "de", "es"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

_SNOWBALL = {"en": "english", "fr": "french", "it": "italian", "de": "german", "es": "spanish"}

_STOP_WORD_LISTS: dict[Language, str] = {
    "en": """
        a about after all also an and any are as at be because been before being between both but by can could did
        do does doing during each few for from further had has have having he her here hers him his how i if in into is
        it
        its itself just me more most my no nor not now of off on once only or other our out over own same she should
        so some such than that the their them then there these they this those through to too under until up very
        was we were what when where which while who whom whose why will with would you your
    """,
    "fr": """
        a ai alors au aucun aussi autre aux avant avec avez avoir avons c ce ceci cela ces cet cette ceux chaque ci
        comme comment d dans de des donc du elle elles en encore entre est et eu eux faut il ils j je l la le les
        leur leurs lui m ma mais me mes moi mon n ne ni nos notre nous on ont ou où par pas peut peuvent plus pour
        pourquoi qu quand que quel quelle quelles quels qui quoi s sa sans se sera ses si son sont sous sur t ta te
        tes toi ton tout toute toutes tous très tu un une vos votre vous y à été être était étaient
    """,
    "it": """
        a abbiamo ad agli ai al alla alle allo anche c che chi ci come con cosa cui d da dagli dai dal dalla dalle
        dallo degli dei del dell della delle dello deve devono di dove e ed era erano essere gli ha hanno ho i il in
        io l la le lei li lo loro lui ma mi mia mio ne negli nei nel nell nella nelle nello no noi non nostra nostro
        o ogni per perché più poi può possono quale quali quando quanti quanto quella quelle quelli quello questa
        queste questi questo qui se sei si sia sono sta stata stati stato su sua sue sugli sui sul sull sulla sulle
        suo suoi tra tu tutti tutto un una uno v vi voi è
    """,
    "de": """
        aber alle allem allen aller alles als also am an auch auf aus bei beim bin bis bist da damit dann das dass
        dein deine dem den denn der des dich die dies diese diesem diesen dieser dieses dir doch dort du durch ein
        eine einem einen einer eines er es euch für gegen gibt habe haben hat hatte hatten hier ich ihm ihn ihnen
        ihr ihre ihrem ihren ihrer im in ins ist ja jede jeder jedes kann kein keine können man mein meine mich mir
        mit muss müssen nach nicht noch nur ob oder ohne sehr sein seine seinem seinen seiner sich sie sind so soll
        sollte sondern über um und uns unser unter viel vom von vor wann war waren warum was weil welche welchem
        welchen welcher welches wenn wer werden wie wieder wir wird wo wurde wurden zu zum zur zwischen
    """,
    "es": """
        a al algo ante antes como con cual cuales cuando cuanto cuántos cuánto cuál cuáles cómo de debe deben del
        desde donde dónde durante e el ella ellas ellos en entre era eran es esa esas ese eso esos esta estas este
        esto estos está están fue fueron ha hay han hasta la las le les lo los me mi mis muy más nada ni no nos
        nosotros nuestra nuestro o os otra otro para pero poco por porque pueden puede que quien quienes quién qué
        se sea ser si sin sobre son su sus sí también tanto te tiene tienen todo todos tu tus un una uno unos
        vosotros y ya yo él
    """,
}
STOP_WORDS = {language: frozenset(text.split()) for language, text in _STOP_WORD_LISTS.items()}

_LETTERS: dict[Language, str] = {"fr": "çèêëîïôùûœâ", "it": "ìòàù", "de": "äöüß", "es": "ñ¿¡áíóú", "en": ""}
_WORD = re.compile(r"[^\W_]+(?:\.(?=\d)\d+)*")
_MIN_MARGIN = 1.15
_SAMPLE_CHARS = 4000


def words(text: str) -> Iterator[str]:
    """Lower-case words and numbers of a text in order; `3.11` stays one word, apostrophes split (`l'acqua`)."""
    for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower()):
        yield match.group()


def detect_language(text: str) -> Language | None:
    """The language with clearly the most function words and typical letters, or `None` where none stands out."""
    sample = text[:_SAMPLE_CHARS]
    tokens = list(words(sample))
    scores = {language: _score(language, tokens, sample) for language in LANGUAGES}
    best, second = sorted(scores.values(), reverse=True)[:2]
    if best == 0 or best < _MIN_MARGIN * second:
        return None
    return max(LANGUAGES, key=scores.__getitem__)


def _score(language: Language, tokens: list[str], sample: str) -> float:
    known = STOP_WORDS[language]
    # A word that few languages share says more than one that all have (`a`, `in`, `la`).
    by_words = sum(_weight(token) for token in tokens if token in known)
    letters = sum(sample.count(letter) for letter in _LETTERS[language])
    return by_words + 0.5 * letters


@lru_cache(maxsize=4096)
def _weight(word: str) -> float:
    return 1.0 / sum(word in stop_words for stop_words in STOP_WORDS.values())


def content_words(text: str) -> list[str]:
    """Words that carry meaning: no function words of its language (of English where it is
    unknown)."""
    language = detect_language(text)
    stop_words = STOP_WORDS[language] if language else STOP_WORDS["en"]
    return [word for word in words(text) if word not in stop_words and (len(word) > 1 or word.isdigit())]


@lru_cache(maxsize=200_000)
def stem(word: str, language: Language) -> str:
    """Snowball stem of one lower-case word; words with digits stay as they are."""
    if any(character.isdigit() for character in word):
        return word
    stemmed: str = SnowballStemmer(_SNOWBALL[language]).stem_word(word)
    return stemmed
