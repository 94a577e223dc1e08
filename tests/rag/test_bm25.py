from __future__ import annotations

import pytest

from rag.bm25 import AVERAGE_LENGTH, K1, B, encode_document, encode_query, spellings


def weight(text: str, word: str, language: str | None = "en") -> float:
    (wanted,) = encode_document(word, language).indices
    vector = encode_document(text, language)
    return dict(zip(vector.indices, vector.values, strict=True)).get(wanted, 0.0)


def test_weights_follow_the_formula() -> None:
    text = "invoice invoice payment"
    norm = K1 * (1 - B + B * 3 / AVERAGE_LENGTH)
    assert weight(text, "invoice") == pytest.approx((K1 + 1) * 2 / (2 + norm))
    assert weight(text, "payment") == pytest.approx((K1 + 1) * 1 / (1 + norm))


def test_repeating_a_word_saturates() -> None:
    gains = [weight("invoice " * n, "invoice") for n in (1, 2, 4, 8)]
    assert gains == sorted(gains)
    assert gains[-1] < K1 + 1


def test_a_longer_text_weighs_the_same_word_less() -> None:
    assert weight("invoice", "invoice") > weight("invoice " + "filler " * 100, "invoice")


@pytest.mark.parametrize(
    ("language", "document", "query"),
    [
        ("en", "The committee approved several invoices", "approving an invoice"),
        ("de", "Die Rechnungen wurden geprüft", "Rechnung prüfen"),
        ("fr", "Les factures sont vérifiées", "vérifier une facture"),
        ("it", "Le fatture vengono approvate", "approvare la fattura"),
        ("es", "Las facturas fueron aprobadas", "aprobar la factura"),
    ],
)
def test_inflected_words_meet(language: str, document: str, query: str) -> None:
    assert set(encode_document(document, language).indices) & set(encode_query(query).indices)


def test_a_question_in_another_language_still_finds_names_and_numbers() -> None:
    document = encode_document("Il portale Docs Italia usa la versione 3.11", "it")
    question = encode_query("Which version does the Docs Italia portal use, is it 3.11?")
    assert len(set(document.indices) & set(question.indices)) >= 2


def test_function_words_are_left_out_unless_there_is_nothing_else() -> None:
    assert encode_document("it is the of and", "en").indices == ()
    assert encode_query("to be or not to be").indices != ()


def test_an_unknown_language_is_kept_word_by_word() -> None:
    assert len(encode_document("jedna druga trzecia", None).indices) == 3
    assert set(encode_document("druga", "pl").indices) <= set(encode_query("druga").indices)


@pytest.mark.parametrize("text", ["", "  \n", "!!! ... --", "x" * 100_000, "\ud800"])
def test_odd_texts_are_no_error(text: str) -> None:
    for vector in (encode_document(text, "en"), encode_query(text)):
        assert len(vector.indices) == len(vector.values) <= 6


def test_indices_are_ascending_and_unique() -> None:
    vector = encode_document("one two three four five six seven", "en")
    assert list(vector.indices) == sorted(set(vector.indices))


def test_spellings_hold_the_word_itself() -> None:
    assert "invoices" in spellings("invoices")
    assert "invoic" in spellings("invoices")
