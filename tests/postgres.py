"""A PostgreSQL server for tests: each test that asks for the fixture `postgres_url` gets an empty database on it."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import find_postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL without a database of a server of our own on a socket in a temporary folder; it refuses to run as root."""
    initdb, postgres = find_postgres("initdb"), find_postgres("postgres")
    assert initdb is not None and postgres is not None
    folder = Path(tempfile.mkdtemp(prefix="windfarm-pg-"))
    folder.chmod(0o777)
    # INT: PostgreSQL's fast end, also where pytest is killed.
    as_user = ["setpriv", "--pdeathsig", "INT"]
    if os.geteuid() == 0:
        as_user += ["--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    data = folder / "data"
    subprocess.run(
        [*as_user, initdb, "--no-sync", "-A", "trust", "-U", "windfarm", "-D", str(data)],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    # The port is only the name of a socket file here, and the folder is ours alone.
    server = subprocess.Popen(
        [*as_user, postgres, "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-p", "5432", "-F"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    for line in server.stderr:
        if "ready to accept connections" in line:
            break
    try:
        yield f"postgresql://windfarm@/{{database}}?host={folder}&port=5432"
    finally:
        server.send_signal(signal.SIGINT)  # its fast end waits for no connection that a failed test has left
        server.wait(20)
        server.stderr.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """URL of an empty database."""
    from sqlalchemy import text

    from services.database import make_engine

    name = f"test_{secrets.token_hex(4)}"
    engine = make_engine(postgres_server.format(database="postgres"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres_server.format(database=name)
