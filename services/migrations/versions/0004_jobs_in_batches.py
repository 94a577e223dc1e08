"""Jobs that can be paused and belong to a batch; where documents came from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("batch", sa.String(length=255), nullable=True))
        table.add_column(sa.Column("is_paused", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("num_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        table.add_column(sa.Column("num_tokens", sa.BigInteger(), nullable=False, server_default="0"))
        table.add_column(sa.Column("source", sa.String(length=1024), nullable=True))
        table.add_column(sa.Column("origin", sa.Text(), nullable=True))
        table.add_column(sa.Column("parse_as", sa.String(length=1024), nullable=True))
        table.add_column(sa.Column("duplicate_of", sa.String(length=1024), nullable=True))
        table.add_column(sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
        table.create_index(op.f("ix_jobs_batch"), ["batch"])
    with op.batch_alter_table("documents") as table:
        table.add_column(sa.Column("source", sa.String(length=1024), nullable=True))
        table.add_column(sa.Column("origin", sa.Text(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("documents") as table:
        table.drop_column("origin")
        table.drop_column("source")
    with op.batch_alter_table("jobs") as table:
        table.drop_index(op.f("ix_jobs_batch"))
        for name in (
            "ended_at",
            "started_at",
            "duplicate_of",
            "parse_as",
            "origin",
            "source",
            "num_tokens",
            "num_bytes",
            "is_paused",
            "batch",
        ):
            table.drop_column(name)
