"""Keys: shown once, stored as hashes, revoked within seconds."""

import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from services.accounts import OWNER_KEY_FILE, Accounts, ensure_owner, read_owner_key
from services.database import ApiKey, Database
from services.errors import ApiError
from services.limits import NO_LIMIT, Limits
from services.schema import upgrade


@pytest.fixture
def database(tmp_path: Path) -> Database:
    url = f"sqlite:///{tmp_path}/windfarm.db"
    upgrade(url)
    return Database(url)


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return Accounts(database)


def test_a_key_signs_its_user_in(accounts: Accounts) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop")
    actor = accounts.authenticate(key)
    assert (actor.name, actor.role) == ("ada", "member")


def test_the_database_never_holds_a_key(accounts: Accounts, database: Database, tmp_path: Path) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop")
    with database.read() as session:
        row = session.scalars(select(ApiKey)).one()
    assert key not in (row.prefix, row.key_hash)
    database.close()
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.glob("windfarm.db*"))


@pytest.mark.parametrize("key", ["", "wf-", "wf-wrong", "x" * 500, "wf-éé\x00", "wf-" + "a" * 43])
def test_wrong_keys_are_refused(accounts: Accounts, key: str) -> None:
    accounts.create_key(accounts.create_user("ada"), "laptop")
    with pytest.raises(ApiError) as refused:
        accounts.authenticate(key)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_a_key_with_the_right_start_and_a_wrong_rest_is_refused(accounts: Accounts) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop")
    with pytest.raises(ApiError):
        accounts.authenticate(key[:-1] + ("a" if key[-1] != "a" else "b"))


def test_a_proved_key_is_known_without_the_database_for_a_moment(accounts: Accounts, database: Database) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop")
    assert accounts.cached(key) is None
    actor = accounts.authenticate(key)
    assert accounts.cached(key) == actor
    forgetful = Accounts(database, cache_ttl_s=0)
    forgetful.authenticate(key)
    assert forgetful.cached(key) is None


def test_a_revoked_key_stops_working_here_at_once_and_elsewhere_after_the_cache(
    accounts: Accounts, database: Database
) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop")
    elsewhere = Accounts(database, cache_ttl_s=0)
    actor = accounts.authenticate(key)
    elsewhere.authenticate(key)
    accounts.revoke_key(actor.key_id)
    assert accounts.cached(key) is None
    for each in (accounts, elsewhere):
        with pytest.raises(ApiError):
            each.authenticate(key)
    (info,) = accounts.list_keys(actor.user_id)
    assert info.revoked_at is not None


def test_limits_of_a_key_go_with_its_actor_and_change_here_at_once(accounts: Accounts) -> None:
    key = accounts.create_key(accounts.create_user("ada"), "laptop", Limits(requests_per_minute=5))
    actor = accounts.authenticate(key)
    assert actor.limits == Limits(5, None, None)
    changed = Limits(None, NO_LIMIT, 2)
    assert accounts.limit_key(actor.key_id, changed).limits == changed
    assert accounts.cached(key) is None
    assert accounts.authenticate(key).limits == changed
    assert [info.limits for info in accounts.list_keys(actor.user_id)] == [changed]
    with pytest.raises(ApiError, match="no api key key_x"):
        accounts.limit_key("key_x", changed)


def test_revoking_an_unknown_key_says_so(accounts: Accounts) -> None:
    with pytest.raises(ApiError, match="no api key key_x"):
        accounts.revoke_key("key_x")


def test_the_first_start_makes_an_owner_whose_key_lies_in_a_private_file(accounts: Accounts, tmp_path: Path) -> None:
    made = ensure_owner(accounts, tmp_path)
    assert made.is_new
    assert accounts.authenticate(made.key).role == "owner"
    assert read_owner_key(tmp_path) == made.key
    assert stat.S_IMODE((tmp_path / OWNER_KEY_FILE).stat().st_mode) == 0o600


def test_later_starts_keep_owner_and_key(accounts: Accounts, tmp_path: Path) -> None:
    first, second = ensure_owner(accounts, tmp_path), ensure_owner(accounts, tmp_path)
    assert second.key == first.key
    assert not second.is_new


def test_a_lost_or_foreign_key_file_is_replaced_for_the_same_owner(accounts: Accounts, tmp_path: Path) -> None:
    first = ensure_owner(accounts, tmp_path)
    (tmp_path / OWNER_KEY_FILE).write_text("wf-of-another-database\n")
    second = ensure_owner(accounts, tmp_path)
    assert second.is_new
    assert accounts.authenticate(second.key).user_id == accounts.authenticate(first.key).user_id
