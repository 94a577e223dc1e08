"""Untrusted text stays text."""

import pytest

from ui.markup import code_block, escape, link_marks, plain_markdown, safe_markdown


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '<img src=x onerror="alert(1)">', "a <b>bold</b> claim", "<svg/onload=x>"]
)
def test_tags_become_text(text: str) -> None:
    assert "<" not in safe_markdown(text)


def test_images_become_links_that_load_nothing() -> None:
    assert safe_markdown("![secret](http://foreign.example/x.png)") == "[secret](http://foreign.example/x.png)"


def test_plain_text_in_markdown_is_neither_image_nor_link_nor_tag() -> None:
    shown = plain_markdown("![x](http://a/b.png) <b>\n`c`")
    assert shown == r"\!\[x\]\(http\:\/\/a\/b\.png\) \<b\> \`c\`"


def test_code_is_left_as_it_is() -> None:
    text = "see `<b>` and\n```html\n<script>![x](y)</script>\n```\nthen <i>"
    assert safe_markdown(text) == text.replace("then <i>", "then &lt;i>")


def test_code_that_still_streams_counts_as_code() -> None:
    assert safe_markdown("```html\n<div>") == "```html\n<div>"


def test_a_fence_of_another_kind_does_not_close_a_block() -> None:
    assert safe_markdown("```\n~~~\n<b>\n```\n<i>") == "```\n~~~\n<b>\n```\n&lt;i>"


def test_an_unclosed_span_is_not_code() -> None:
    assert safe_markdown("a ` <b>") == "a ` &lt;b>"


def test_diagrams_are_shown_as_their_source() -> None:
    assert safe_markdown("```mermaid\ngraph TD\n```").startswith("```text")


def test_marks_with_a_citation_become_links_and_others_stay() -> None:
    linked = link_marks("It is so [1], not so [7]. `x[1]` [1](http://a)", "msg_1", {1})
    assert linked == "It is so [\\[1\\]](#cite-msg_1-1), not so [7]. `x[1]` [1](http://a)"


def test_a_code_block_cannot_be_closed_by_its_content() -> None:
    assert code_block("a\n```\n<b>").startswith("````text\n")


def test_quotes_are_escaped_for_attributes() -> None:
    assert escape('"><script>') == "&quot;&gt;&lt;script&gt;"
