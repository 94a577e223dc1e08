"""Tuning of collections."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("collections") as table:
        table.add_column(sa.Column("tuning", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("collections") as table:
        table.drop_column("tuning")
