"""Who may use windfarm: the owner, api keys, and the check of a key.

A key is shown once, when it is made; the database keeps its sha256 (a key holds 256 random bits, so a slow password
hash would protect nothing and cost every request). A revoked key stops working within `CACHE_TTL_S` in every process.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select

from services.database import ApiKey, Database, User, utc_now
from services.errors import ApiError, not_found
from services.limits import INHERITED, Limits

KEY_START = "wf-"
_PREFIX_LENGTH = len(KEY_START) + 8
_MAX_KEY_LENGTH = 200
CACHE_TTL_S = 2.0
_MAX_CACHED = 4096
OWNER_KEY_FILE = "owner.key"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks. Goes along to every part that reads or writes somebody's data."""

    user_id: str
    name: str
    role: str
    key_id: str
    limits: Limits = INHERITED
    """The key's own values."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be told of a key later on: never the key."""

    id: str
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None
    limits: Limits = INHERITED


def wrong_key() -> ApiError:
    return ApiError(
        401,
        "authentication_error",
        "invalid_api_key",
        "This api key is wrong or was revoked. `windfarm key` prints the owner's key.",
    )


def missing_key() -> ApiError:
    return ApiError(
        401,
        "authentication_error",
        "missing_api_key",
        "No api key was sent. Add the header `Authorization: Bearer <key>`; `windfarm key` prints the owner's key.",
    )


class Accounts:
    """Users and keys of one database. Everything here blocks except `cached`; async code uses a thread."""

    def __init__(self, database: Database, cache_ttl_s: float = CACHE_TTL_S) -> None:
        self._database = database
        self._cache_ttl_s = cache_ttl_s
        self._cache: dict[str, tuple[float, Actor]] = {}

    def cached(self, key: str) -> Actor | None:
        """The actor of a key that was proved a moment ago, without touching the database."""
        entry = self._cache.get(_hash(key))
        if entry is None or time.monotonic() - entry[0] > self._cache_ttl_s:
            return None
        return entry[1]

    def authenticate(self, key: str) -> Actor:
        """The actor of a valid key; 401 for any other. Compares hashes in constant time."""
        if len(key) > _MAX_KEY_LENGTH:
            raise wrong_key()
        digest = _hash(key)
        with self._database.read() as session:
            row = session.execute(
                select(ApiKey, User).join(User, User.id == ApiKey.user_id).where(ApiKey.prefix == key[:_PREFIX_LENGTH])
            ).first()
        expected = row[0].key_hash if row else "0" * len(digest)
        is_right = hmac.compare_digest(digest, expected)
        if row is None or not is_right or row[0].revoked_at is not None:
            self._cache.pop(digest, None)
            raise wrong_key()
        actor = Actor(row[1].id, row[1].name, row[1].role, row[0].id, _limits(row[0]))
        self._remember(digest, actor)
        return actor

    def create_user(self, name: str, role: str = "member") -> str:
        with self._database.write() as session:
            user = User(name=name, role=role)
            session.add(user)
            session.flush()
            return user.id

    def create_key(self, user_id: str, name: str, limits: Limits = INHERITED) -> str:
        """A new key for a user, with its own limits. The only moment in which it can be seen."""
        key = KEY_START + secrets.token_urlsafe(32)
        with self._database.write() as session:
            if session.get(User, user_id) is None:
                raise not_found(f"There is no user {user_id}.", code="user_not_found")
            row = ApiKey(user_id=user_id, name=name, prefix=key[:_PREFIX_LENGTH], key_hash=_hash(key))
            _set_limits(row, limits)
            session.add(row)
        return key

    def list_keys(self, user_id: str) -> list[KeyInfo]:
        with self._database.read() as session:
            rows = session.scalars(select(ApiKey).where(ApiKey.user_id == user_id).order_by(ApiKey.created_at)).all()
        return [_info(row) for row in rows]

    def limit_key(self, key_id: str, limits: Limits) -> KeyInfo:
        """Give a key other limits; they hold within `CACHE_TTL_S` in every process."""
        with self._database.write() as session:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise not_found(f"There is no api key {key_id}.", code="key_not_found")
            _set_limits(row, limits)
        self._forget(key_id)
        return _info(row)

    def revoke_key(self, key_id: str) -> None:
        with self._database.write() as session:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise not_found(f"There is no api key {key_id}.", code="key_not_found")
            row.revoked_at = row.revoked_at or utc_now()
        self._forget(key_id)

    def owner_id(self) -> str | None:
        with self._database.read() as session:
            return session.scalar(select(User.id).where(User.role == "owner").order_by(User.created_at).limit(1))

    def _forget(self, key_id: str) -> None:
        self._cache = {digest: entry for digest, entry in self._cache.items() if entry[1].key_id != key_id}

    def _remember(self, digest: str, actor: Actor) -> None:
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        self._cache[digest] = (time.monotonic(), actor)


@dataclass(frozen=True, slots=True)
class OwnerKey:
    key: str
    is_new: bool


def ensure_owner(accounts: Accounts, home: Path) -> OwnerKey:
    """The owner's key of this data folder: read from its file, made where there is none that works.

    Call it after the schema is up to date. Whoever can read the file or write the database is the owner anyway.
    """
    path = home / OWNER_KEY_FILE
    owner_id = accounts.owner_id() or accounts.create_user("owner", "owner")
    if (key := read_owner_key(home)) and _works(accounts, key):
        return OwnerKey(key, is_new=False)
    key = accounts.create_key(owner_id, "owner key of this machine")
    _write_secret(path, key)
    return OwnerKey(key, is_new=True)


def read_owner_key(home: Path) -> str | None:
    path = home / OWNER_KEY_FILE
    return path.read_text(encoding="ascii").strip() if path.exists() else None


def _works(accounts: Accounts, key: str) -> bool:
    try:
        return accounts.authenticate(key).role == "owner"
    except ApiError:
        return False


def _write_secret(path: Path, secret: str) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _limits(row: ApiKey) -> Limits:
    return Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrent_streams)


def _set_limits(row: ApiKey, limits: Limits) -> None:
    for name, value in asdict(limits).items():
        setattr(row, name, value)


def _info(row: ApiKey) -> KeyInfo:
    return KeyInfo(row.id, row.name, row.prefix, row.created_at, row.revoked_at, _limits(row))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
