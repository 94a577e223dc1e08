"""All commands under one name."""

from __future__ import annotations

import typer

from services.cli import (
    evaluation,
    experts,
    feedback,
    jobs,
    keys,
    knowledge,
    machine,
    people,
    planning,
    running,
    sharing,
    sync,
    talking,
    tuning,
)

app = typer.Typer(
    name="windfarm",
    help="A self-hosted platform for open-weight models: chat, documents, one OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    running.up,
    running.down,
    running.apply,
    running.status,
    running.logs,
    machine.doctor,
    machine.env,
    keys.key,
    planning.plan,
    experts.experts,
    talking.ask,
    talking.chat,
    knowledge.ingest,
    sync.sync,
    knowledge.search,
    knowledge.collections,
    knowledge.documents,
    knowledge.reembed,
    tuning.tune,
    sharing.share,
    sharing.delete,
    sharing.receipts,
):
    app.command()(_command)
app.add_typer(evaluation.app)
app.add_typer(jobs.app)
app.add_typer(feedback.app)
app.add_typer(people.users)
app.add_typer(people.groups)
