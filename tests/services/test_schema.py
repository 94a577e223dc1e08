"""Migrations lead to the tables that the models describe, on SQLite and PostgreSQL, whoever starts at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from services.accounts import Accounts
from services.conversations import Conversations
from services.database import Base, Database, make_engine, normalized_url
from services.limits import INHERITED
from services.schema import _config, differences, upgrade
from services.setup_errors import StartRefused


def _sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/windfarm.db"


def test_migrations_and_models_agree(tmp_path: Path) -> None:
    upgrade(_sqlite(tmp_path))
    assert differences(_sqlite(tmp_path)) == []


def test_every_thing_that_windfarm_keeps_has_its_table(tmp_path: Path) -> None:
    upgrade(_sqlite(tmp_path))
    with create_engine(_sqlite(tmp_path)).connect() as connection:
        tables = set(inspect(connection).get_table_names())
    assert tables >= {"users", "groups", "group_members", "api_keys", "conversations", "messages"}
    assert tables >= {"collections", "documents", "versions", "jobs", "journal"}
    assert tables >= {"collection_readers", "document_readers", "message_sources", "deletion_receipts"}


def test_a_second_upgrade_changes_nothing(tmp_path: Path) -> None:
    upgrade(_sqlite(tmp_path))
    Accounts(Database(_sqlite(tmp_path))).create_user("ada")
    upgrade(_sqlite(tmp_path))
    with create_engine(_sqlite(tmp_path)).connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM users")) == 1


def test_an_older_windfarm_keeps_its_people_documents_and_answers(tmp_path: Path) -> None:
    """Nobody gets a right by the step, and what its answers rest on is read out of their citations and steps."""
    url = _sqlite(tmp_path)
    with make_engine(url).connect() as connection:
        command.upgrade(_config(connection), "0002")
        when = "'2026-01-01'"
        steps = '[{"event": "retrieval", "passages": [{"document_id": "doc_2"}]}, {"event": "y"}]'
        rows = {
            "users (id, name, role, created_at)": f"'user_1', 'ada', 'owner', {when}",
            "collections (id, name, description, owner_id, index_id, embedding_model, embedding_dimension, "
            "created_at)": f"'col_1', 'box', '', 'user_1', 'col_1', 'm', 4, {when}",
            "documents (id, collection_id, name, owner_id, created_at)": f"'doc_1', 'col_1', 'a', 'user_1', {when}",
            "conversations (id, user_id, title, collections, created_at, updated_at)": "'conv_1', 'user_1', 't', '[]', "
            f"{when}, {when}",
            "messages (id, conversation_id, position, role, content, citations, steps, state, created_at)": "'msg_1', "
            f"""'conv_1', 0, 'assistant', 'x', '[{{"document_id": "doc_1"}}]', '{steps}', 'complete', {when}""",
        }
        for into, values in rows.items():
            connection.execute(text(f"INSERT INTO {into} VALUES ({values})"))
        connection.commit()
    upgrade(url)
    with create_engine(url).connect() as connection:
        for table in ("users", "collections"):
            assert connection.scalar(text(f"SELECT tenant FROM {table}")) == "default"
        assert connection.scalar(text("SELECT has_own_readers FROM documents")) == 0
        assert connection.scalar(text("SELECT count(*) FROM collection_readers")) == 0
        sources = connection.execute(text("SELECT message_id, document_id FROM message_sources ORDER BY document_id"))
        assert [tuple(row) for row in sources] == [("msg_1", "doc_1"), ("msg_1", "doc_2")]
    with make_engine(url).connect() as connection:
        command.downgrade(_config(connection), "0002")
        connection.commit()
    upgrade(url)
    assert differences(url) == []


def test_keys_of_an_older_windfarm_get_the_defaults(tmp_path: Path) -> None:
    url = _sqlite(tmp_path)
    with make_engine(url).connect() as connection:
        command.upgrade(_config(connection), "0001")
        connection.execute(text("INSERT INTO users VALUES ('user_1', 'ada', 'owner', '2026-01-01')"))
        columns = "id, user_id, name, prefix, key_hash, created_at"
        values = "'key_1', 'user_1', 'laptop', 'wf-12345678', 'x', '2026-01-01'"
        connection.execute(text(f"INSERT INTO api_keys ({columns}) VALUES ({values})"))
        connection.commit()
    upgrade(url)
    assert differences(url) == []
    (info,) = Accounts(Database(url)).list_keys("user_1")
    assert (info.id, info.limits) == ("key_1", INHERITED)


def test_starters_at_the_same_time_do_not_collide(tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: upgrade(_sqlite(tmp_path)), range(6)))
    assert differences(_sqlite(tmp_path)) == []


def test_a_database_of_newer_code_is_refused(tmp_path: Path) -> None:
    upgrade(_sqlite(tmp_path))
    with create_engine(_sqlite(tmp_path)).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartRefused, match=r"written by newer code \(schema 9999"):
        upgrade(_sqlite(tmp_path))


def test_a_database_that_cannot_be_opened_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "windfarm.db").mkdir()
    with pytest.raises(StartRefused, match=r"windfarm\.db cannot be opened"):
        upgrade(_sqlite(tmp_path))


def test_a_database_in_memory_is_refused_because_processes_could_not_share_it() -> None:
    with pytest.raises(StartRefused, match="several processes"):
        upgrade("sqlite://")


def test_all_tables_compile_for_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in Base.metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))


def test_postgresql_urls_get_the_driver_that_is_installed() -> None:
    assert normalized_url("postgresql://u:p@db/windfarm") == "postgresql+psycopg://u:p@db/windfarm"
    assert normalized_url("sqlite:////data/windfarm.db") == "sqlite:////data/windfarm.db"


@pytest.mark.integration
@pytest.mark.requires("postgres")
def test_postgresql_gets_the_same_tables_and_serves_the_same_code(postgres_url: str) -> None:
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: upgrade(postgres_url), range(3)))
    assert differences(postgres_url) == []
    database = Database(postgres_url)
    accounts, conversations = Accounts(database), Conversations(database)
    actor = accounts.authenticate(accounts.create_key(accounts.create_user("ada"), "test"))
    conversation = conversations.create(actor)
    conversations.add_message(actor, conversation["id"], "user", "How high is the tower?")
    (message,) = conversations.get(actor, conversation["id"])["messages"]
    assert message["content"] == "How high is the tower?"
    assert inspect(database.engine).has_table("versions")
    database.close()
