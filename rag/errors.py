"""What can go wrong between a file and a passage. Each message names the cause and the next step."""


class RagError(Exception):
    """Base of all errors of this package."""


class ParseError(RagError):
    """A file cannot be turned into text. `code` is stable for programs; the message is for people."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class StoreError(RagError):
    """The vector store cannot do what was asked."""


class StoreLocked(StoreError):
    """Another process owns the store's folder."""


class StoreUnavailable(StoreError):
    """The vector store's server does not answer right now; the same call may work later."""


class StoreMissing(StoreError):
    """The store's folder is gone although the database knows collections in it."""


class EmbeddingMismatch(RagError):
    """A collection was built with another embedding model."""


class EmbedderUnavailable(RagError):
    """No embedding model answers right now; the same call may work later."""


class EvaluationError(RagError):
    """A test set or a setting of an evaluation cannot be used."""
