"""Conversations keep their order, belong to one user, and can be taken back to an earlier message."""

from pathlib import Path

import pytest

from services.accounts import Accounts, Actor
from services.conversations import Conversations, title_of
from services.database import Database
from services.errors import ApiError
from services.schema import upgrade


@pytest.fixture
def database(tmp_path: Path) -> Database:
    url = f"sqlite:///{tmp_path}/windfarm.db"
    upgrade(url)
    return Database(url)


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database)


@pytest.fixture
def ada(database: Database) -> Actor:
    return Actor(Accounts(database).create_user("ada"), "ada", "member", "key_1")


@pytest.fixture
def bob(database: Database) -> Actor:
    return Actor(Accounts(database).create_user("bob"), "bob", "member", "key_2")


def test_messages_come_back_in_their_order_with_all_that_belongs_to_them(
    conversations: Conversations, ada: Actor
) -> None:
    made = conversations.create(ada, model="tiny", collections=["handbook"])
    conversations.add_message(ada, made["id"], "user", "How high?")
    conversations.add_message(
        ada, made["id"], "assistant", "100 m [1]", citations=[{"number": 1}], steps=[{"event": "x"}], state="stopped"
    )
    found = conversations.get(ada, made["id"])
    assert [message["content"] for message in found["messages"]] == ["How high?", "100 m [1]"]
    answer = found["messages"][1]
    assert (answer["citations"], answer["steps"], answer["state"]) == ([{"number": 1}], [{"event": "x"}], "stopped")
    assert (found["model"], found["collections"]) == ("tiny", ["handbook"])


def test_the_first_question_names_an_untitled_conversation(conversations: Conversations, ada: Actor) -> None:
    untitled, titled = conversations.create(ada), conversations.create(ada, title="Towers")
    for made in (untitled, titled):
        conversations.add_message(ada, made["id"], "user", "How high is the tower?")
    titles = {entry["id"]: entry["title"] for entry in conversations.list(ada)}
    assert titles == {untitled["id"]: "How high is the tower?", titled["id"]: "Towers"}


def test_long_questions_are_cut_at_a_word() -> None:
    assert title_of("word " * 40) == ("word " * 12).strip() + "…"
    assert title_of("  \n ") == "New conversation"


def test_the_conversation_that_was_used_last_comes_first(conversations: Conversations, ada: Actor) -> None:
    first, second = conversations.create(ada), conversations.create(ada)
    conversations.add_message(ada, first["id"], "user", "again")
    assert [entry["id"] for entry in conversations.list(ada)] == [first["id"], second["id"]]


def test_a_message_and_all_after_it_can_be_deleted(conversations: Conversations, ada: Actor) -> None:
    made = conversations.create(ada)
    ids = [conversations.add_message(ada, made["id"], "user", str(number)) for number in range(4)]
    assert conversations.delete_from(ada, made["id"], ids[1]) == 3
    conversations.add_message(ada, made["id"], "user", "new")
    assert [message["content"] for message in conversations.get(ada, made["id"])["messages"]] == ["0", "new"]


def test_somebody_elses_conversation_does_not_exist(conversations: Conversations, ada: Actor, bob: Actor) -> None:
    made = conversations.create(ada)
    message = conversations.add_message(ada, made["id"], "user", "mine")
    attempts = [
        lambda: conversations.get(bob, made["id"]),
        lambda: conversations.update(bob, made["id"], {"title": "x"}),
        lambda: conversations.delete(bob, made["id"]),
        lambda: conversations.delete_from(bob, made["id"], message),
        lambda: conversations.add_message(bob, made["id"], "user", "x"),
    ]
    for attempt in attempts:
        with pytest.raises(ApiError) as refused:
            attempt()
        assert (refused.value.status, refused.value.code) == (404, "conversation_not_found")
    assert conversations.list(bob) == []


def test_a_deleted_conversation_takes_its_messages_along(conversations: Conversations, ada: Actor) -> None:
    made = conversations.create(ada)
    conversations.add_message(ada, made["id"], "user", "x")
    conversations.delete(ada, made["id"])
    with pytest.raises(ApiError):
        conversations.get(ada, made["id"])
