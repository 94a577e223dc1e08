"""A vector store as its owner sees it, for tests that are not about rights."""

from __future__ import annotations

from rag.access import DEFAULT_TENANT, CollectionGrant, FilteredStore, Reader, StoreAsSeenBy, label_points

ANYBODY = Reader("user_anybody")
LABELS = label_points(DEFAULT_TENANT, None)
"""What the points of a document say that has no readers of its own."""


def seen(store: FilteredStore, *index_ids: str) -> StoreAsSeenBy:
    """These indexes, all of which belong to whoever asks."""
    grants = tuple(CollectionGrant(index_id, owner_id=ANYBODY.user_id) for index_id in index_ids)
    return StoreAsSeenBy(ANYBODY, store, grants)
