"""Alembic runs this file; the connection comes from the caller, who holds the lock that keeps two starters apart."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from services.database import Base, UtcDateTime


def _render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Steps name plain column types: they must not change when our own types do."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
    render_as_batch=True,
    render_item=_render_item,
)
with context.begin_transaction():
    context.run_migrations()
