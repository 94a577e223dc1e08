"""The components of the page and where they stand; what they do is wired elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.documents import file_field
from ui.feedback import OPTIONS
from ui.panels import brand, icon_button, source_list
from ui.signing_in import splash

# Not a protection: it only has to stay the same, or a restart of this process would sign everybody out.
_STORAGE_SECRET = "windfarm"

_WELCOME = """## Ask anything, or ask your documents

**1 · Add documents** with the paper clip, or drop files anywhere on this page.\\
**2 · Choose collections** below the question: answers then cite the passages that they come from.\\
**3 · Ask.** Press Enter to send, Shift + Enter for a new line. Everything stays on this machine.
"""

_EXAMPLES: list[Any] = [
    {"text": "Explain in simple words what a mixture of experts is.", "display_text": "What is a mixture of experts?"},
    {"text": "Write a short poem about the wind.", "display_text": "Write a short poem about the wind"},
    {"text": "How do you say good morning in Italian?", "display_text": "Good morning in Italian?"},
]

# Clicks on the lists become events that carry the `data-` attributes of the button and of its row.
_LIST_SCRIPT = """
element.addEventListener('click', (event) => windfarm.listClick(event, (name, data) => {
  if (name === 'open') trigger('open', data);
  if (name === 'rename') trigger('rename', data);
  if (name === 'delete') trigger('delete', data);
  if (name === 'cite') trigger('cite', data);
  if (name === 'sign-out') trigger('leave', data);
}));
"""
_SOURCES_SCRIPT = (
    _LIST_SCRIPT
    + """
windfarm.openSource = (message, number) => trigger('cite', {message, number});
watch('value', () => windfarm.showMarked(element));
"""
)


@dataclass(frozen=True, slots=True)
class Page:
    """All components that an event reads or writes."""

    key: Any
    conversation_id: Any
    splash: Any
    sign_in: Any
    shell: Any
    key_box: Any
    sign_in_button: Any
    sign_in_notice: Any
    new_chat: Any
    conversations: Any
    account: Any
    model: Any
    chat: Any
    question: Any
    collections: Any
    has_tools: Any
    sources: Any
    files: Any
    uploads: Any
    target: Any
    documents: Any
    new_name: Any
    create: Any
    delete_collection: Any


def build_page() -> Page:
    """Must run inside `gr.Blocks`."""
    key = gr.BrowserState("", storage_key="windfarm-key", secret=_STORAGE_SECRET)
    conversation_id = gr.Textbox(visible="hidden", elem_id="wf-conversation-id", show_label=False, container=False)
    opening = splash()
    sign_in, key_box, sign_in_button, sign_in_notice = _sign_in()
    with gr.Row(visible=False, elem_id="wf-shell", equal_height=True) as shell:
        new_chat, conversations, account = _side()
        model, chat, question, collections, has_tools = _main()
        sources, files, uploads, target, documents, new_name, create, delete_collection = _panel()
    return Page(
        key=key,
        conversation_id=conversation_id,
        splash=opening,
        sign_in=sign_in,
        shell=shell,
        key_box=key_box,
        sign_in_button=sign_in_button,
        sign_in_notice=sign_in_notice,
        new_chat=new_chat,
        conversations=conversations,
        account=account,
        model=model,
        chat=chat,
        question=question,
        collections=collections,
        has_tools=has_tools,
        sources=sources,
        files=files,
        uploads=uploads,
        target=target,
        documents=documents,
        new_name=new_name,
        create=create,
        delete_collection=delete_collection,
    )


def _sign_in() -> tuple[Any, ...]:
    with gr.Column(visible=False, elem_id="wf-sign-in") as card:
        gr.HTML(f"{brand()}<p>Chat with the models and the documents of this machine.</p>", apply_default_css=False)
        key_box = gr.Textbox(
            label="Your key",
            type="password",
            placeholder="wf-…",
            elem_id="wf-key",
            autofocus=True,
            html_attributes=gr.InputHTMLAttributes(autocomplete="current-password", spellcheck=False),
        )
        notice = gr.HTML(elem_id="wf-sign-in-notice", apply_default_css=False)
        button = gr.Button("Sign in", variant="primary", elem_id="wf-sign-in-button")
        gr.HTML(
            '<p class="wf-hint">The key was printed when windfarm started for the first time; '
            "<code>windfarm key</code> shows it again. It is kept in this browser until you sign out.</p>",
            apply_default_css=False,
        )
    return card, key_box, button, notice


def _side() -> tuple[Any, ...]:
    with gr.Column(elem_id="wf-side", min_width=0):
        gr.HTML(
            f'<div class="wf-side-head">{brand()}{icon_button("close", "Close the side bar", "side")}</div>',
            apply_default_css=False,
        )
        new_chat = gr.Button("New chat", elem_id="wf-new-chat", size="md")
        conversations = gr.HTML(js_on_load=_LIST_SCRIPT, elem_id="wf-conversations", apply_default_css=False)
        account = gr.HTML(js_on_load=_LIST_SCRIPT, elem_id="wf-account", apply_default_css=False)
    return new_chat, conversations, account


def _main() -> tuple[Any, ...]:
    with gr.Column(elem_id="wf-main", min_width=0):
        with gr.Row(elem_id="wf-top"):
            _tools(icon_button("menu", "Conversations", "side"))
            model = gr.Dropdown(
                label="Model", show_label=False, container=False, elem_id="wf-model", interactive=True, min_width=0
            )
            _tools(
                icon_button("documents", "Documents", "panel", panel="documents")
                + icon_button("sources", "Sources", "panel", panel="sources")
            )
        chat = gr.Chatbot(
            elem_id="wf-chat",
            show_label=False,
            label="Conversation",
            container=False,
            height="100%",
            layout="bubble",
            placeholder=_WELCOME,
            examples=_EXAMPLES,
            buttons=["copy"],
            feedback_options=OPTIONS,
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            latex_delimiters=[{"left": "$$", "right": "$$", "display": True}],
        )
        with gr.Column(elem_id="wf-composer", min_width=0):
            question = gr.Textbox(
                label="Question",
                show_label=False,
                container=False,
                placeholder="Ask a question …",
                lines=1,
                max_lines=8,
                autofocus=True,
                submit_btn=True,
                elem_id="wf-question",
                html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
            )
            with gr.Row(elem_id="wf-options"):
                _tools(icon_button("attach", "Add documents", "attach"))
                collections = gr.Dropdown(
                    label="Answer from collections",
                    show_label=False,
                    container=False,
                    multiselect=True,
                    interactive=True,
                    elem_id="wf-collections",
                    min_width=0,
                )
                has_tools = gr.Checkbox(
                    label="Tools", value=False, container=False, elem_id="wf-tools-on", min_width=0, interactive=True
                )
    return model, chat, question, collections, has_tools


def _panel() -> tuple[Any, ...]:
    with gr.Column(elem_id="wf-panel", min_width=0):
        gr.HTML(
            '<div class="wf-panel-head"><h2 class="wf-for-sources">Sources</h2>'
            '<h2 class="wf-for-documents">Documents</h2>'
            f"{icon_button('close', 'Close the panel', 'panel', panel='')}</div>",
            apply_default_css=False,
        )
        with gr.Column(elem_id="wf-panel-sources", min_width=0):
            sources = gr.HTML(
                source_list((), ""), js_on_load=_SOURCES_SCRIPT, elem_id="wf-sources", apply_default_css=False
            )
        with gr.Column(elem_id="wf-panel-documents", min_width=0):
            target = gr.Dropdown(label="Collection", interactive=True, elem_id="wf-target", min_width=0)
            files = file_field(label="Add files", show_label=False, elem_id="wf-files", height=120)
            uploads = gr.HTML(elem_id="wf-uploads", apply_default_css=False)
            documents = gr.HTML(js_on_load=_LIST_SCRIPT, elem_id="wf-documents", apply_default_css=False)
            with gr.Accordion("Manage collections", open=False, elem_id="wf-manage"):
                with gr.Row():
                    new_name = gr.Textbox(
                        label="New collection", placeholder="handbook", elem_id="wf-new-name", min_width=0, scale=3
                    )
                    create = gr.Button("Create", elem_id="wf-create", min_width=0, scale=1)
                delete = gr.Button("Delete this collection and its documents", variant="stop", elem_id="wf-delete")
    return sources, files, uploads, target, documents, new_name, create, delete


def _tools(buttons: str) -> None:
    gr.HTML(buttons, elem_classes="wf-tools", min_width=0, apply_default_css=False)
