"""Tenants, readers of collections and documents, what answers rest on, receipts of deletions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OF_A_TENANT = ("users", "groups", "collections")
LIVING = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    # Plain additions: making one of these tables anew would drop the rows that refer to it.
    for table in OF_A_TENANT:
        op.add_column(table, sa.Column("tenant", sa.String(length=255), nullable=False, server_default="default"))
    op.add_column("documents", sa.Column("has_own_readers", sa.Boolean(), nullable=False, server_default=sa.false()))

    op.drop_index("uq_collections_living_name", "collections")
    op.create_index(
        "uq_collections_living_name_of_owner",
        "collections",
        ["owner_id", "name"],
        unique=True,
        sqlite_where=LIVING,
        postgresql_where=LIVING,
    )

    _create_readers("collection_readers", "collection_id", "collections")
    _create_readers("document_readers", "document_id", "documents")

    op.create_table(
        "message_sources",
        sa.Column("message_id", sa.String(length=255), nullable=False),
        sa.Column("document_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["message_id"], ["messages.id"], name=op.f("fk_message_sources_message_id_messages"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("message_id", "document_id", name=op.f("pk_message_sources")),
    )
    op.create_index(op.f("ix_message_sources_document_id"), "message_sources", ["document_id"], unique=False)

    _find_sources()

    op.create_table(
        "deletion_receipts",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("subject_id", sa.String(length=255), nullable=False),
        sa.Column("subject_name", sa.String(length=1024), nullable=False),
        sa.Column("tenant", sa.String(length=255), nullable=False),
        sa.Column("owner_id", sa.String(length=255), nullable=False),
        sa.Column("actor_id", sa.String(length=255), nullable=False),
        sa.Column("removed", sa.JSON(), nullable=False),
        sa.Column("self_check", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deletion_receipts")),
    )
    op.create_index(op.f("ix_deletion_receipts_subject_id"), "deletion_receipts", ["subject_id"], unique=False)


def _find_sources() -> None:
    """What the answers that are there already rest on, as far as their citations and steps tell."""
    connection = op.get_bind()
    messages = connection.execute(sa.text("SELECT id, citations, steps FROM messages WHERE role = 'assistant'"))
    rows = [
        {"message_id": message_id, "document_id": document_id}
        for message_id, *told in messages.all()
        for document_id in sorted({found for each in told for found in _document_ids(each)})
    ]
    if rows:
        sources = sa.table("message_sources", sa.column("message_id"), sa.column("document_id"))
        connection.execute(sources.insert(), rows)


def _document_ids(value: Any) -> Iterator[str]:
    if isinstance(value, str):  # SQLite keeps JSON as text
        value = json.loads(value)
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if isinstance(entry, dict):
            if isinstance(found := entry.get("document_id"), str):
                yield found
            yield from _document_ids([each for each in entry.get("passages") or () if isinstance(each, dict)])


def _create_readers(table: str, column: str, of_table: str) -> None:
    op.create_table(
        table,
        sa.Column(column, sa.String(length=255), nullable=False),
        sa.Column("reader_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            [column], [f"{of_table}.id"], name=op.f(f"fk_{table}_{column}_{of_table}"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(column, "reader_id", name=op.f(f"pk_{table}")),
    )
    op.create_index(op.f(f"ix_{table}_reader_id"), table, ["reader_id"], unique=False)


def downgrade() -> None:
    for table in ("deletion_receipts", "message_sources", "document_readers", "collection_readers"):
        op.drop_table(table)
    op.drop_index("uq_collections_living_name_of_owner", "collections")
    op.create_index(
        "uq_collections_living_name",
        "collections",
        ["name"],
        unique=True,
        sqlite_where=LIVING,
        postgresql_where=LIVING,
    )
    op.drop_column("documents", "has_own_readers")
    for table in reversed(OF_A_TENANT):
        op.drop_column(table, "tenant")
