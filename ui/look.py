"""How the page looks: a theme from system fonts (no font is fetched), the style sheet and the script of the page."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STATIC = Path(__file__).parent / "static"

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    fonts = [gr.themes.Font(name) for name in _SANS]
    mono = [gr.themes.Font(name) for name in _MONO]
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=fonts,
        font_mono=mono,
    )
    return base.set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#0f1418",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#0f1418",
        background_fill_secondary="#f5f7f8",
        background_fill_secondary_dark="#151b20",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        border_color_primary="#e1e6ea",
        border_color_primary_dark="#28323a",
        input_background_fill="#ffffff",
        input_background_fill_dark="#171f25",
        input_border_width="1px",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f8a80",
        button_primary_background_fill_hover_dark="#12a094",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#eef2f4",
        button_secondary_background_fill_dark="#1d262d",
        link_text_color="#0f766e",
        link_text_color_dark="#5eead4",
    )


def head() -> str:
    """Script and style of the page for its head.

    The style is not given as Gradio's own `css`: Gradio rewrites each selector to lie below its container, and ours
    reach `html` and `body`.
    """
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    style = (STATIC / "page.css").read_text(encoding="utf-8")
    return f"<style>{style}</style>\n<script>{script}</script>"
