from __future__ import annotations

import pytest

from rag.language import content_words, detect_language, stem, words


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How long is the notice period for employees?", "en"),
        ("Wie lang ist die Kündigungsfrist?", "de"),
        ("Quelle est la durée du préavis pour les employés ?", "fr"),
        ("Quanto dura il periodo di preavviso per i dipendenti?", "it"),
        ("¿Cuánto dura el período de preaviso de los empleados?", "es"),
    ],
)
def test_a_short_question_is_recognised(text: str, language: str) -> None:
    assert detect_language(text) == language


@pytest.mark.parametrize("text", ["", "42", "Qdrant HNSW int8", "これは日本語です", "???"])
def test_what_is_unsure_is_unknown(text: str) -> None:
    assert detect_language(text) is None


def test_words_keep_versions_and_split_apostrophes() -> None:
    assert list(words("L'acqua di Python 3.11, Straße")) == ["l", "acqua", "di", "python", "3.11", "straße"]


def test_words_see_through_compatibility_forms() -> None:
    assert list(words("ﬁle ①")) == ["file", "1"]


def test_content_words_leave_function_words_out() -> None:
    assert content_words("How long is the parental leave?") == ["long", "parental", "leave"]


def test_words_with_digits_are_not_stemmed() -> None:
    assert stem("2019s", "en") == "2019s"
    assert stem("leaves", "en") == "leav"
