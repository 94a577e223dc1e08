"""Feedback; files and what vector stores have beside collections."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("user_id", sa.String(255), nullable=False),
        sa.Column("message_id", sa.String(255), nullable=False),
        sa.Column("rating", sa.String(255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("model", sa.String(255), nullable=True),
        sa.Column("collections", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("relevant", sa.JSON(), nullable=False),
        sa.Column("reviewer_id", sa.String(255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reviewed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_feedback_user_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.UniqueConstraint("message_id", name="uq_feedback_message_id"),
    )
    op.create_index("ix_feedback_user_id", "feedback", ["user_id"])
    op.create_index("ix_feedback_state", "feedback", ["state"])
    op.create_table(
        "feedback_passages",
        sa.Column("feedback_id", sa.String(255), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("document_id", sa.String(255), nullable=False),
        sa.Column("version_id", sa.String(255), nullable=False),
        sa.Column("document", sa.String(1024), nullable=False),
        sa.Column("collection", sa.String(255), nullable=True),
        sa.Column("page", sa.Integer(), nullable=True),
        sa.Column("start", sa.Integer(), nullable=False),
        sa.Column("end", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("is_cited", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["feedback_id"], ["feedback.id"], name="fk_feedback_passages_feedback_id_feedback", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("feedback_id", "position", name="pk_feedback_passages"),
    )
    op.create_index("ix_feedback_passages_document_id", "feedback_passages", ["document_id"])
    op.create_table(
        "files",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("owner_id", sa.String(255), nullable=False),
        sa.Column("filename", sa.String(1024), nullable=False),
        sa.Column("purpose", sa.String(255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name="fk_files_owner_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_owner_id", "files", ["owner_id"])
    op.create_table(
        "vector_stores",
        sa.Column("collection_id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(1024), nullable=True),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collections.id"],
            name="fk_vector_stores_collection_id_collections",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("collection_id", name="pk_vector_stores"),
    )
    op.create_table(
        "vector_store_files",
        sa.Column("collection_id", sa.String(255), nullable=False),
        sa.Column("file_id", sa.String(255), nullable=False),
        sa.Column("document_name", sa.String(1024), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("batch_id", sa.String(255), nullable=True),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collections.id"],
            name="fk_vector_store_files_collection_id_collections",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["file_id"], ["files.id"], name="fk_vector_store_files_file_id_files", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("collection_id", "file_id", name="pk_vector_store_files"),
    )
    op.create_index("ix_vector_store_files_file_id", "vector_store_files", ["file_id"])


def downgrade() -> None:
    for table in ("vector_store_files", "vector_stores", "files", "feedback_passages", "feedback"):
        op.drop_table(table)
