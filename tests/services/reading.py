"""What a person finds through the very search of the product."""

from __future__ import annotations

from services.knowledge import Knowledge
from services.retrieval import SearchableCollections
from tests.services.ingesting import Running


def found_by(windfarm: Running, actor: str, text: str, *collections: str, limit: int = 50) -> set[str]:
    """Names of the documents in which somebody finds these words."""
    seen = SearchableCollections(
        Knowledge(windfarm.database), windfarm.store, windfarm.journal._visible, actor, lambda collection: None
    )
    hits = seen.search(collections or ("handbook",), vector=None, text=text, limit=limit)
    return {hit.chunk.document_name for hit in hits}
