"""Jobs that can be paused and belong to a batch; where documents came from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


OF_JOBS = (
    sa.Column("batch", sa.String(length=255), nullable=True),
    sa.Column("is_paused", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("num_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("num_tokens", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("source", sa.String(length=1024), nullable=True),
    sa.Column("origin", sa.Text(), nullable=True),
    sa.Column("parse_as", sa.String(length=1024), nullable=True),
    sa.Column("duplicate_of", sa.String(length=1024), nullable=True),
    sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
    sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
)
OF_DOCUMENTS = (
    sa.Column("source", sa.String(length=1024), nullable=True),
    sa.Column("origin", sa.Text(), nullable=True),
)


def upgrade() -> None:
    # Plain additions: making one of these tables anew would drop the rows that refer to it.
    for table, columns in (("jobs", OF_JOBS), ("documents", OF_DOCUMENTS)):
        for column in columns:
            op.add_column(table, column.copy())
    op.create_index(op.f("ix_jobs_batch"), "jobs", ["batch"])


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_batch"), "jobs")
    for table, columns in (("documents", OF_DOCUMENTS), ("jobs", OF_JOBS)):
        for column in reversed(columns):
            op.drop_column(table, column.name)
