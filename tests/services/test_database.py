"""Writers wait for each other, readers see whole transactions, times keep their zone."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from services.database import Database, Group, GroupMember, User, new_id
from services.schema import upgrade


@pytest.fixture
def database(tmp_path: Path) -> Database:
    url = f"sqlite:///{tmp_path}/windfarm.db"
    upgrade(url)
    return Database(url)


def test_ids_name_their_kind_and_differ() -> None:
    assert new_id("conv").startswith("conv_")
    assert new_id("conv") != new_id("conv")


def test_times_come_back_with_their_zone(database: Database) -> None:
    with database.write() as session:
        session.add(User(name="ada"))
    with database.read() as session:
        assert session.scalars(select(User)).one().created_at.tzinfo is UTC


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as session:
            session.add(User(name="ada"))
            session.flush()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(User)) == 0


def test_many_writers_that_read_first_all_succeed(database: Database) -> None:
    def count_and_add(number: int) -> None:
        with database.write() as session:
            session.scalar(select(func.count()).select_from(User))
            session.add(User(name=f"user {number}"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count_and_add, range(40)))
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(User)) == 40


def test_references_to_rows_that_do_not_exist_are_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(GroupMember(group_id="nobody", user_id="nobody"))


def test_members_go_with_their_group(database: Database) -> None:
    with database.write() as session:
        user, group = User(name="ada"), Group(name="staff")
        session.add_all([user, group])
        session.flush()
        session.add(GroupMember(group_id=group.id, user_id=user.id))
    with database.write() as session:
        session.delete(session.scalars(select(Group)).one())
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(GroupMember)) == 0
