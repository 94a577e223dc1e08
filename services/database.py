"""The database: every table as a typed model, and one `Database` that hands out sessions.

SQLite in the data folder by default, PostgreSQL by URL. Tables change through the migrations package alone; a test
proves that models and migrations agree. Calls block: async code runs them in a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    create_engine,
    event,
    false,
    make_url,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from rag.access import DEFAULT_TENANT

_BUSY_TIMEOUT_MS = 15_000
_WRITE = "windfarm_write"


def new_id(prefix: str) -> str:
    """A random id that names its kind, such as `conv_3f...`."""
    return f"{prefix}_{secrets.token_hex(12)}"


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC times on both databases (SQLite alone would forget the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


class Base(DeclarativeBase):
    # Names by rule, so that migrations can name every constraint on both databases.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: String(255),
        datetime: UtcDateTime(),
        dict[str, Any]: JSON,
        list[Any]: JSON,
        bytes: LargeBinary,
    }


class User(Base):
    __tablename__ = "users"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("user"))
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str] = mapped_column(default="member")
    """`owner` (of the installation, all tenants), `administrator` (of the tenant), `operator` or `member`."""
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Group(Base):
    __tablename__ = "groups"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("group"))
    name: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class GroupMember(Base):
    __tablename__ = "group_members"

    group_id: Mapped[str] = mapped_column(ForeignKey("groups.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, index=True)


class ApiKey(Base):
    """`prefix` finds the row, `key_hash` (sha256 of the whole key) proves it; the key itself is stored nowhere here."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("key"))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    key_hash: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    revoked_at: Mapped[datetime | None]
    requests_per_minute: Mapped[int | None]
    """None: the default of the configuration; 0: no limit. The same for the next two."""
    tokens_per_minute: Mapped[int | None]
    concurrent_streams: Mapped[int | None]


class Conversation(Base):
    __tablename__ = "conversations"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("conv"))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    title: Mapped[str]
    model: Mapped[str | None]
    collections: Mapped[list[Any]] = mapped_column(default=list)
    """Names of the collections that were chosen last, so that a reloaded page shows them."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)


class Message(Base):
    __tablename__ = "messages"
    __table_args__ = (Index(None, "conversation_id", "position", unique=True),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("msg"))
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    position: Mapped[int]
    role: Mapped[str]
    content: Mapped[str] = mapped_column(Text)
    citations: Mapped[list[Any]] = mapped_column(default=list)
    steps: Mapped[list[Any]] = mapped_column(default=list)
    state: Mapped[str] = mapped_column(default="complete")
    """`complete`, `stopped` (by its reader) or `failed`."""
    model: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class MessageSource(Base):
    """A document whose text an answer could use, or that an earlier answer of its conversation could. No foreign key to
    the document: a row that outlived it still says that the answer may not be shown."""

    __tablename__ = "message_sources"

    message_id: Mapped[str] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True)
    document_id: Mapped[str] = mapped_column(primary_key=True, index=True)


_LIVING = text("deleted_at IS NULL")


class Collection(Base):
    """A name is unique among an owner's living collections: a wider rule would tell what others have. A deleted one
    keeps its row until its vectors are gone."""

    __tablename__ = "collections"
    __table_args__ = (
        Index(
            "uq_collections_living_name_of_owner",
            "owner_id",
            "name",
            unique=True,
            sqlite_where=_LIVING,
            postgresql_where=_LIVING,
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("col"))
    name: Mapped[str]
    description: Mapped[str] = mapped_column(Text, default="")
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    index_id: Mapped[str]
    """Name of its index in the vector store; embedding anew fills another index and then changes this name."""
    embedding_model: Mapped[str]
    embedding_dimension: Mapped[int]
    tuning: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What `windfarm tune` found on the collection's own questions; see `services.tuning`."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]


class Document(Base):
    """A file of a collection. What it says lies in its versions; searches see the active one alone."""

    __tablename__ = "documents"
    __table_args__ = (
        Index(
            "uq_documents_living_name",
            "collection_id",
            "name",
            unique=True,
            sqlite_where=_LIVING,
            postgresql_where=_LIVING,
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("doc"))
    collection_id: Mapped[str] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(1024))
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    active_version_id: Mapped[str | None]
    """No foreign key: documents and versions would refer to each other. The reconciler proves it instead."""
    source: Mapped[str | None] = mapped_column(String(1024))
    """The folder, repository or website that a synchronisation keeps in step with; none: brought by hand."""
    origin: Mapped[str | None] = mapped_column(Text)
    """Where this very file came from, such as its URL."""
    has_own_readers: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Otherwise its readers are those of the collection."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]


class CollectionReader(Base):
    """Somebody who may read a collection: the id of a user or a group, or `EVERYBODY`."""

    __tablename__ = "collection_readers"

    collection_id: Mapped[str] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    reader_id: Mapped[str] = mapped_column(primary_key=True, index=True)


class DocumentReader(Base):
    """The same for a document with readers of its own."""

    __tablename__ = "document_readers"

    document_id: Mapped[str] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True)
    reader_id: Mapped[str] = mapped_column(primary_key=True, index=True)


class Version(Base):
    """One state of a document's content. `text_zlib` is the parsed text (UTF-8, zlib) that citations point into."""

    __tablename__ = "versions"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ver"))
    document_id: Mapped[str] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), index=True)
    content_sha256: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int]
    mime_type: Mapped[str]
    title: Mapped[str | None] = mapped_column(Text)
    language: Mapped[str | None] = mapped_column(String(16))
    num_chunks: Mapped[int] = mapped_column(default=0)
    num_characters: Mapped[int] = mapped_column(default=0)
    state: Mapped[str]
    text_zlib: Mapped[bytes]
    pages: Mapped[list[Any]] = mapped_column(default=list)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Job(Base):
    """Work on a collection that survives a restart: `ingest` a file that waits at `blob_path`, fetch the `url` in
    `origin`, `reembed` all of it, or `repair` the vectors of one document from its stored text.

    `state` is queued, parsing, embedding, done, failed or cancelled; a paused job keeps its place and begins anew."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("job"))
    collection_id: Mapped[str] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"), index=True)
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str] = mapped_column(default="ingest")
    filename: Mapped[str] = mapped_column(String(1024))
    blob_path: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(default="queued", index=True)
    progress: Mapped[float] = mapped_column(default=0.0)
    document_id: Mapped[str | None]
    version_id: Mapped[str | None]
    num_chunks: Mapped[int] = mapped_column(default=0)
    unchanged: Mapped[bool] = mapped_column(default=False)
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    batch: Mapped[str | None] = mapped_column(index=True)
    """Jobs that were submitted together, such as all files of one `windfarm ingest`."""
    is_paused: Mapped[bool] = mapped_column(default=False)
    num_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    num_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    """Tokens of all passages together; known when the file has been cut."""
    source: Mapped[str | None] = mapped_column(String(1024))
    origin: Mapped[str | None] = mapped_column(Text)
    parse_as: Mapped[str | None] = mapped_column(String(1024))
    """A name with the ending of the file's type, where its own name has none (a web page)."""
    duplicate_of: Mapped[str | None] = mapped_column(String(1024))
    """Name of another document of the collection that has the same content."""
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class Feedback(Base):
    """What somebody said of one answer, with the question and the answer as they were; one per message."""

    __tablename__ = "feedback"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("fb"))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    message_id: Mapped[str] = mapped_column(unique=True)
    """No foreign key: feedback outlives the conversation."""
    rating: Mapped[str]
    """`up` or `down`."""
    reason: Mapped[str] = mapped_column(Text, default="")
    question: Mapped[str] = mapped_column(Text)
    answer: Mapped[str] = mapped_column(Text)
    """Empty once a document that it rested on was deleted."""
    model: Mapped[str | None]
    collections: Mapped[list[Any]] = mapped_column(default=list)
    state: Mapped[str] = mapped_column(default="new", index=True)
    """`new`, `accepted` or `rejected`."""
    relevant: Mapped[list[Any]] = mapped_column(default=list)
    """Ids of the documents that hold the answer, as the reviewer judged."""
    reviewer_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    reviewed_at: Mapped[datetime | None]


class FeedbackPassage(Base):
    """A passage that an answer was given or that it cites. `text` is kept of cited ones."""

    __tablename__ = "feedback_passages"

    feedback_id: Mapped[str] = mapped_column(ForeignKey("feedback.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    document_id: Mapped[str] = mapped_column(index=True)
    version_id: Mapped[str]
    document: Mapped[str] = mapped_column(String(1024))
    collection: Mapped[str | None]
    page: Mapped[int | None]
    start: Mapped[int]
    end: Mapped[int]
    text: Mapped[str | None] = mapped_column(Text)
    is_cited: Mapped[bool]


class StoredFile(Base):
    """A file that a client uploaded to its own account; documents are made of it by adding it to a vector store."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    filename: Mapped[str] = mapped_column(String(1024))
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class VectorStoreInfo(Base):
    """What OpenAI's vector stores have and collections lack; only for collections that were made or changed as one."""

    __tablename__ = "vector_stores"

    collection_id: Mapped[str] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(1024))
    """As the client gave it; the collection's own name is unique and obeys rules."""
    attributes: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """OpenAI's `metadata`."""


class VectorStoreFile(Base):
    """A file in a vector store: the document `document_name` of that collection, once its job has ended."""

    __tablename__ = "vector_store_files"

    collection_id: Mapped[str] = mapped_column(ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True, index=True)
    document_name: Mapped[str] = mapped_column(String(1024))
    job_id: Mapped[str]
    batch_id: Mapped[str | None]
    attributes: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class DeletionReceipt(Base):
    """What a deletion removed, and what a look for it found afterwards (none yet: `self_check` is empty). No text."""

    __tablename__ = "deletion_receipts"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("receipt"))
    kind: Mapped[str]
    """`document` or `collection`."""
    subject_id: Mapped[str] = mapped_column(index=True)
    subject_name: Mapped[str] = mapped_column(String(1024))
    tenant: Mapped[str]
    owner_id: Mapped[str]
    """Who owned the collection. No foreign keys: a receipt outlives everything that it names."""
    actor_id: Mapped[str]
    removed: Mapped[dict[str, Any]]
    self_check: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    checked_at: Mapped[datetime | None]


class JournalEntry(Base):
    """A change that touches database and vector store; what a crash interrupted is finished from here."""

    __tablename__ = "journal"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    operation: Mapped[str]
    payload: Mapped[dict[str, Any]] = mapped_column(default=dict)
    state: Mapped[str] = mapped_column(default="begun", index=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


def normalized_url(url: str) -> str:
    """The URL with the driver that windfarm brings along (psycopg 3 for PostgreSQL)."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def make_engine(url: str) -> Engine:
    engine = create_engine(normalized_url(url), pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling is off, so that `_begin_sqlite` decides when a transaction takes the lock.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", f"busy_timeout={_BUSY_TIMEOUT_MS}", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    # A transaction that reads first and writes later would fail at once when another process wrote in between;
    # one that takes the write lock at its start waits instead.
    is_write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


class Database:
    """Sessions on one database. Objects stay readable after their session has ended."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._writer = self.engine.execution_options(**{_WRITE: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed at the end, rolled back when an error leaves the block."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()
