"""Bring a database to the schema of this code: `upgrade(url)`, safe to call from several processes at once.

A database that newer code wrote is refused rather than changed.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from services.database import Base, make_engine
from services.setup_errors import StartRefused

_MIGRATIONS = Path(__file__).parent / "migrations"
# Any number works that nobody else takes on the same PostgreSQL database.
_POSTGRES_LOCK = 0x77666D67


def upgrade(url: str) -> None:
    """Run the steps that this database lacks. Raises `StartRefused` with the next step where that cannot be done."""
    engine = make_engine(url)
    try:
        with _only_one_starter(engine), engine.connect() as connection:
            _refuse_newer_schema(connection)
            config = _config(connection)
            command.upgrade(config, "head")
            connection.commit()
    except OperationalError as error:
        raise StartRefused(
            f"The database at {engine.url.render_as_string()} cannot be opened or changed: {error.orig}. "
            "Check that it exists, that there is space, and that this user may write it."
        ) from error
    finally:
        engine.dispose()


def differences(url: str) -> list[object]:
    """What the models say and the database lacks, or the other way round; empty when they agree."""
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, Base.metadata))
    finally:
        engine.dispose()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _refuse_newer_schema(connection: Connection) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    present = MigrationContext.configure(connection).get_current_revision()
    if present is not None and present not in known:
        raise StartRefused(
            f"The database was written by newer code (schema {present}, this code knows up to {max(known)}). "
            "Start the newer windfarm, or use another data folder."
        )


@contextmanager
def _only_one_starter(engine: Engine) -> Iterator[None]:
    if engine.dialect.name == "sqlite":
        with _file_lock(engine.url.database):
            yield
        return
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _POSTGRES_LOCK})
        yield  # Closing the connection gives the lock back, also when this process dies.


@contextmanager
def _file_lock(database: str | None) -> Iterator[None]:
    if database in (None, "", ":memory:"):
        raise StartRefused("windfarm needs a database file that several processes can open, not one in memory.")
    path = Path(f"{database}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise StartRefused(
            f"The database's folder {path.parent} cannot be written: {error}. Name another one."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_migration(message: str) -> None:
    """For developers: a new step from the difference between the models and the steps so far."""
    with TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/steps.db"
        upgrade(url)
        with make_engine(url).connect() as connection:
            config = _config(connection)
            number = len(list(ScriptDirectory.from_config(config).walk_revisions())) + 1
            command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")


if __name__ == "__main__":
    write_migration(sys.argv[1])
