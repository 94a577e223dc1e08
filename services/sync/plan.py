"""What a synchronisation has to do: the items of a source beside the documents of a collection. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from services.sync.connector import Item, Skipped

Document = Mapping[str, Any]
"""A document as the API lists it."""


@dataclass(slots=True)
class SyncPlan:
    new: list[Item] = field(default_factory=list)
    changed: list[Item] = field(default_factory=list)
    unchanged: list[Item] = field(default_factory=list)
    removed: list[Document] = field(default_factory=list)
    conflicts: list[Skipped] = field(default_factory=list)
    """Names that documents of other sources have already."""

    @property
    def has_work(self) -> bool:
        return bool(self.new or self.changed or self.removed)


def make_plan(items: Sequence[Item], documents: Sequence[Document], source: str) -> SyncPlan:
    """Documents that nobody synchronises (uploaded by hand) are taken over where an item has their name; those of
    another source are left alone."""
    by_name = {str(document["name"]): document for document in documents}
    plan = SyncPlan()
    for item in items:
        document = by_name.get(item.name)
        if document is None:
            plan.new.append(item)
        elif document.get("source") not in (source, None):
            plan.conflicts.append(Skipped(item.name, f"A document of this name belongs to {document['source']}."))
        elif document.get("source") == source and _is_unchanged(item, document):
            plan.unchanged.append(item)
        else:
            plan.changed.append(item)
    wanted = {item.name for item in items}
    plan.removed = [each for each in documents if each.get("source") == source and each["name"] not in wanted]
    return plan


def _is_unchanged(item: Item, document: Document) -> bool:
    if item.content_sha256 is not None:
        return item.content_sha256 == document["content_sha256"]
    if item.origin_is_exact:
        return item.origin == document.get("origin")
    if item.modified_at is None:
        return False
    stored_at = datetime.fromtimestamp(document["updated_at"], UTC)
    return datetime.fromtimestamp(item.modified_at, UTC) < stored_at
