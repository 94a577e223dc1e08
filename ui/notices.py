"""Short messages in the corner of the page."""

from __future__ import annotations

import gradio as gr

from ui.markup import escape


def warn(message: str) -> None:
    """Show a sentence; Gradio would take it as HTML, and it may quote names that people and files chose."""
    gr.Warning(escape(message), title="windfarm")


def thank(message: str) -> None:
    gr.Info(escape(message), title="windfarm")
