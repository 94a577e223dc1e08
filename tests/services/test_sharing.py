"""Who may read what, through the whole store: groups, readers of collections and documents, tenants; at once, and with
nothing told of the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rag.access import PointLabels
from rag.vector_store import VectorStore
from services.database import Document, User
from services.errors import ApiError
from services.people import People
from services.reconciler import reconcile
from services.sharing import ReaderChange, ReaderNames, Sharing
from tests.services.filling import add_document
from tests.services.ingesting import OWNER, Running, running
from tests.services.reading import found_by

ANNA, BEN, CARL, FAR, ADMIN = "user_anna", "user_ben", "user_carl", "user_far", "user_admin"


@asynccontextmanager
async def people_and_handbook(folder: Path, url: str | None = None) -> AsyncIterator[Running]:
    """Two documents of the owner's, and people who may read them once they are told to. `url`: of the database."""
    async with running(folder, url=url) as made:
        with made.database.write() as session:
            for user_id in (ANNA, BEN, CARL):
                session.add(User(id=user_id, name=user_id.removeprefix("user_")))
            session.add(User(id=ADMIN, name="admin", role="administrator"))
            session.add(User(id=FAR, name="far", role="administrator", tenant="other"))
        made.create()
        collection = made.knowledge.collection("handbook", OWNER)
        for name in ("pay.txt", "rules.txt"):
            text = f"The salary table of {name} is secret."
            add_document(made.database, made.store, made.journal, collection, name, text, made.embedder.dimension)
        yield made


@pytest.fixture
async def windfarm(tmp_path: Path) -> AsyncIterator[Running]:
    async with people_and_handbook(tmp_path) as made:
        yield made


def share(windfarm: Running, document: str | None = None, actor: str = OWNER, **change: object) -> dict[str, object]:
    sharing = Sharing(windfarm.database, windfarm.journal)
    return sharing.share("handbook", document, ReaderChange(**change), actor)  # type: ignore[arg-type]


def names(*users: str, groups: tuple[str, ...] = (), everybody: bool = False) -> ReaderNames:
    return ReaderNames(users, groups, everybody)


def document_id(windfarm: Running, name: str) -> str:
    documents = windfarm.knowledge.list_documents("handbook", OWNER)
    return next(str(document["id"]) for document in documents if document["name"] == name)


def readable(windfarm: Running, actor: str) -> set[str]:
    """Names of documents, asked in every way; all must agree."""
    try:
        listed = {document["name"] for document in windfarm.knowledge.list_documents("handbook", actor)}
        described = windfarm.knowledge.describe_collection("handbook", actor)
    except ApiError as error:
        assert (error.status, error.code) == (404, "unknown_collection")
        assert windfarm.knowledge.list_collections(actor) == []
        with pytest.raises(ApiError):
            found_by(windfarm, actor, "salary")
        listed = set()
    else:
        (shown,) = windfarm.knowledge.list_collections(actor)
        assert shown == described
        assert described["num_documents"] == described["num_chunks"] == len(listed)
        assert found_by(windfarm, actor, "salary") == listed
    for document in windfarm.knowledge.list_documents("handbook", OWNER):
        if document["name"] in listed:
            assert "secret" in windfarm.knowledge.document(str(document["id"]), actor)["text"]
        else:
            with pytest.raises(ApiError) as refused:
                windfarm.knowledge.document(str(document["id"]), actor)
            with pytest.raises(ApiError) as unknown:
                windfarm.knowledge.document("doc_unknown", actor)
            assert refused.value.status == unknown.value.status == 404
            assert str(refused.value).replace(str(document["id"]), "X") == str(unknown.value).replace(
                "doc_unknown", "X"
            )
    return listed


BOTH = {"pay.txt", "rules.txt"}


async def test_a_collection_is_its_owners_and_the_administrators_until_it_is_shared(windfarm: Running) -> None:
    assert [readable(windfarm, each) for each in (OWNER, ADMIN)] == [BOTH, BOTH]
    assert [readable(windfarm, each) for each in (ANNA, FAR)] == [set(), set()]


async def test_readers_of_a_collection_read_what_has_no_readers_of_its_own(windfarm: Running) -> None:
    share(windfarm, only=names("anna"))
    share(windfarm, document_id(windfarm, "pay.txt"), only=names("ben"))
    assert readable(windfarm, ANNA) == {"rules.txt"}
    assert readable(windfarm, BEN) == {"pay.txt"}
    assert readable(windfarm, CARL) == set()
    share(windfarm, document_id(windfarm, "pay.txt"), inherit=True)
    assert readable(windfarm, ANNA) == BOTH
    assert readable(windfarm, BEN) == set()


async def test_a_membership_holds_at_once_and_ends_at_once(windfarm: Running) -> None:
    people = People(windfarm.database)
    people.create_group("hr", None, OWNER)
    share(windfarm, only=names(groups=("hr",)))
    assert readable(windfarm, ANNA) == set()
    people.add_member("hr", "anna", ADMIN)
    assert readable(windfarm, ANNA) == BOTH
    people.remove_member("hr", "anna", ADMIN)
    assert readable(windfarm, ANNA) == set()
    people.add_member("hr", "anna", ADMIN)
    people.delete_group("hr", ADMIN)
    assert readable(windfarm, ANNA) == set()


async def test_what_is_added_to_a_document_starts_from_its_collection(windfarm: Running) -> None:
    share(windfarm, only=names("anna"))
    share(windfarm, document_id(windfarm, "pay.txt"), add=names("ben"))
    assert readable(windfarm, ANNA) == BOTH
    assert readable(windfarm, BEN) == {"pay.txt"}
    share(windfarm, document_id(windfarm, "rules.txt"), remove=names("anna"))
    assert readable(windfarm, ANNA) == {"pay.txt"}
    assert readable(windfarm, OWNER) == BOTH


async def test_everybody_means_the_tenant(windfarm: Running) -> None:
    share(windfarm, only=names(everybody=True))
    assert [readable(windfarm, each) for each in (ANNA, BEN, FAR)] == [BOTH, BOTH, set()]
    share(windfarm, remove=names(everybody=True))
    assert readable(windfarm, ANNA) == set()


async def test_people_of_another_tenant_cannot_be_named(windfarm: Running) -> None:
    with pytest.raises(ApiError, match="no user 'far'") as refused:
        share(windfarm, add=names("far"))
    with pytest.raises(ApiError) as unknown:
        share(windfarm, add=names("who"))
    assert (refused.value.status, refused.value.code) == (unknown.value.status, unknown.value.code)


async def test_readers_may_not_change_and_strangers_see_nothing_to_change(windfarm: Running) -> None:
    share(windfarm, only=names("anna"))
    for actor, status in ((ANNA, 403), (BEN, 404), (FAR, 404)):
        for attempt in (
            lambda actor=actor: share(windfarm, add=names("ben"), actor=actor),
            lambda actor=actor: share(windfarm, document_id(windfarm, "pay.txt"), inherit=True, actor=actor),
            lambda actor=actor: Sharing(windfarm.database, windfarm.journal).readers("handbook", None, actor),
            lambda actor=actor: windfarm.knowledge.managed_collection("handbook", actor),
        ):
            with pytest.raises(ApiError) as refused:
                attempt()
            assert refused.value.status == status, (actor, refused.value)
    with pytest.raises(ApiError) as refused:
        await windfarm.service.submit("handbook", "x.txt", b"x", ANNA)
    assert refused.value.code == "read_only_collection"
    with pytest.raises(ApiError) as refused:
        await windfarm.service.delete_document("handbook", document_id(windfarm, "pay.txt"), ANNA)
    assert refused.value.status == 403
    assert readable(windfarm, OWNER) == BOTH


async def test_jobs_name_files_and_are_told_to_those_who_change_the_collection(windfarm: Running) -> None:
    share(windfarm, only=names("anna"))
    job = windfarm.knowledge.list_jobs("handbook", OWNER)[0]
    assert windfarm.knowledge.list_jobs("handbook", ANNA) == []
    with pytest.raises(ApiError, match="no job"):
        windfarm.knowledge.job(job["id"], ANNA)


async def test_a_revoked_right_is_not_seen_through_a_store_that_lags(
    windfarm: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store still says that Anna may read; the database, which decides, does not."""
    pay = document_id(windfarm, "pay.txt")
    share(windfarm, pay, only=names("anna"))
    assert readable(windfarm, ANNA) == {"pay.txt"}
    with monkeypatch.context() as patched:
        patched.setattr(type(windfarm.store), "label_document", lambda *_: None)
        share(windfarm, pay, only=names("ben"))
    assert windfarm.store.list_versions()[version_of(windfarm, pay)].labels == PointLabels("default", (ANNA,))
    assert readable(windfarm, ANNA) == set()
    report = reconcile(windfarm.database, windfarm.store, windfarm.journal, windfarm.blobs)
    assert report.num_relabelled == 1 and not report.agreed
    assert readable(windfarm, ANNA) == set()
    assert readable(windfarm, BEN) == {"pay.txt"}
    windfarm.check_agreement()


def version_of(windfarm: Running, document: str) -> str:
    with windfarm.database.read() as session:
        return str(session.get_one(Document, document).active_version_id)


async def test_a_change_that_a_crash_interrupted_is_carried_out_at_the_next_start(
    windfarm: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay = document_id(windfarm, "pay.txt")

    def crash(*_: object) -> None:
        raise SystemError("power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(type(windfarm.store), "label_document", crash)
        with pytest.raises(SystemError):
            share(windfarm, pay, only=names("ben"))
    report = reconcile(windfarm.database, windfarm.store, windfarm.journal, windfarm.blobs)
    assert report.num_replayed == 1 and report.agreed
    assert readable(windfarm, BEN) == {"pay.txt"}


async def test_a_new_version_keeps_the_documents_own_readers(windfarm: Running) -> None:
    share(windfarm, document_id(windfarm, "pay.txt"), only=names("ben"))
    await windfarm.ingest("handbook", "pay.txt", "The new salary table of pay.txt is secret too.")
    assert readable(windfarm, BEN) == {"pay.txt"}
    assert readable(windfarm, ANNA) == set()


async def test_a_new_embedding_keeps_the_documents_own_readers(windfarm: Running) -> None:
    share(windfarm, only=names("anna"))
    share(windfarm, document_id(windfarm, "pay.txt"), only=names("ben"))
    job = await windfarm.service.reembed("handbook", OWNER)
    assert (await windfarm.service.wait_for_job(job["id"], OWNER, 60))["state"] == "done"
    assert readable(windfarm, BEN) == {"pay.txt"}
    assert readable(windfarm, ANNA) == {"rules.txt"}
    windfarm.check_agreement()
    # Its index has another name now, which is nobody's to say.
    collection = windfarm.knowledge.collection("handbook", OWNER)
    assert collection.index_id != collection.id
    with pytest.raises(ApiError, match="There is no collection"):
        windfarm.knowledge.collection(collection.index_id, OWNER)


async def test_points_of_an_earlier_windfarm_get_their_labels_at_the_start(windfarm: Running) -> None:
    """They say nothing of readers: nobody finds them until the start has put that right."""
    index_id = windfarm.knowledge.collection("handbook", OWNER).index_id
    for name in BOTH:
        _forget_labels(windfarm.store, index_id, document_id(windfarm, name))
    assert found_by(windfarm, OWNER, "salary") == set()
    report = reconcile(windfarm.database, windfarm.store, windfarm.journal, windfarm.blobs)
    assert report.num_relabelled == 2
    assert found_by(windfarm, OWNER, "salary") == BOTH
    windfarm.check_agreement()


def _forget_labels(store: VectorStore, index_id: str, document: str) -> None:
    store.label_document(index_id, document, PointLabels("", ()))


async def test_names_may_be_the_same_for_different_owners(windfarm: Running) -> None:
    """A refusal would tell Ben that somebody has a collection of that name."""
    made = windfarm.knowledge.create_collection("handbook", "", BEN, embedding_model="hash", dimension=32)
    assert windfarm.knowledge.collection("handbook", BEN).id == made["id"]
    assert windfarm.knowledge.collection("handbook", OWNER).id != made["id"]
    with pytest.raises(ApiError) as ambiguous:
        windfarm.knowledge.collection("handbook", ADMIN)
    assert ambiguous.value.code == "ambiguous_collection" and made["id"] in ambiguous.value.message
    assert windfarm.knowledge.collection(made["id"], ADMIN).owner_id == BEN
    with pytest.raises(ApiError, match="There is no collection"):
        windfarm.knowledge.collection(made["id"], ANNA)
    with pytest.raises(ApiError, match="exists already"):
        windfarm.knowledge.create_collection("handbook", "", BEN, embedding_model="hash", dimension=32)


async def test_a_hint_names_only_what_may_be_read(windfarm: Running) -> None:
    with pytest.raises(ApiError) as refused:
        windfarm.knowledge.collection("handbok", ANNA)
    assert "handbook" not in refused.value.message
    with pytest.raises(ApiError, match="Did you mean 'handbook'"):
        windfarm.knowledge.collection("handbok", OWNER)
