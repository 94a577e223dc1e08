"""Users, groups and who belongs to them. The owner looks after all tenants, an administrator after their own.

Whoever asks is looked up in the database for each call, so that a role that was taken ends at once. People of other
tenants do not exist for an administrator. Calls block.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rag.access import DEFAULT_TENANT, Reader
from services.database import (
    Collection,
    CollectionReader,
    Database,
    Document,
    DocumentReader,
    Group,
    GroupMember,
    Job,
    User,
)
from services.errors import ApiError, conflict, forbidden, invalid, not_found
from services.rights import ADMINISTRATOR, MEMBER, OPERATOR, OWNER, ROLES, reader_of

_NAME = re.compile(r"[^\W_][\w .@+\-]{0,99}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9\-]{0,62}")


class People:
    def __init__(self, database: Database) -> None:
        self._database = database

    # Users

    def list_users(self, actor: str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            administrator = require_administrator(session, actor)
            users = select(User).order_by(User.name)
            if administrator.tenant is not None:
                users = users.where(User.tenant == administrator.tenant)
            return [_user_json(session, user) for user in session.scalars(users)]

    def user(self, name: str, actor: str) -> dict[str, Any]:
        with self._database.read() as session:
            return _user_json(session, find_user(session, require_administrator(session, actor).tenant, name))

    def managed_user_id(self, name: str, actor: str) -> str:
        """Of a user whose keys the actor may make and revoke. An owner's keys are every right there is."""
        with self._database.read() as session:
            administrator = require_administrator(session, actor)
            user = find_user(session, administrator.tenant, name)
            if user.role == OWNER and administrator.tenant is not None:
                raise forbidden(
                    "Only an owner of the installation may look after an owner's keys.", code="role_not_yours"
                )
            return user.id

    def create_user(self, name: str, role: str, tenant: str | None, actor: str) -> dict[str, Any]:
        """`tenant` None: that of the actor."""
        with _unique_names("user", name), self._database.write() as session:
            administrator = require_administrator(session, actor)
            _check_role(administrator, role)
            user = User(name=_checked(name, "user"), role=role, tenant=_chosen_tenant(administrator, tenant))
            session.add(user)
            session.flush()
            return _user_json(session, user)

    def change_role(self, name: str, role: str, actor: str) -> dict[str, Any]:
        with self._database.write() as session:
            administrator = require_administrator(session, actor)
            _check_role(administrator, role)
            user = find_user(session, administrator.tenant, name)
            _spare_the_owner(session, administrator, user, stays=role == OWNER)
            user.role = role
            return _user_json(session, user)

    def delete_user(self, name: str, actor: str) -> dict[str, Any]:
        """With keys, conversations and every right. Refused while the user owns collections: nobody else may decide
        what becomes of them."""
        with self._database.write() as session:
            administrator = require_administrator(session, actor)
            user = find_user(session, administrator.tenant, name)
            _spare_the_owner(session, administrator, user, stays=False)
            owned = session.scalars(
                select(Collection.name).where(Collection.owner_id == user.id).order_by(Collection.name).limit(5)
            ).all()
            if owned:
                raise conflict(
                    f"{user.name} owns collections ({', '.join(owned)}). Delete them first (`windfarm delete`).",
                    code="user_owns_collections",
                )
            _hand_over(session, user)
            _forget_reader(session, user.id)
            session.delete(user)
            return {"id": user.id, "object": "user.deleted", "name": user.name, "deleted": True}

    # Groups

    def list_groups(self, actor: str) -> list[dict[str, Any]]:
        with self._database.read() as session:
            administrator = require_administrator(session, actor)
            groups = select(Group).order_by(Group.name)
            if administrator.tenant is not None:
                groups = groups.where(Group.tenant == administrator.tenant)
            return [_group_json(session, group) for group in session.scalars(groups)]

    def group(self, name: str, actor: str) -> dict[str, Any]:
        with self._database.read() as session:
            return _group_json(session, find_group(session, require_administrator(session, actor).tenant, name))

    def create_group(self, name: str, tenant: str | None, actor: str) -> dict[str, Any]:
        with _unique_names("group", name), self._database.write() as session:
            administrator = require_administrator(session, actor)
            group = Group(name=_checked(name, "group"), tenant=_chosen_tenant(administrator, tenant))
            session.add(group)
            session.flush()
            return _group_json(session, group)

    def delete_group(self, name: str, actor: str) -> dict[str, Any]:
        """What the group alone could read, its members can read no more."""
        with self._database.write() as session:
            group = find_group(session, require_administrator(session, actor).tenant, name)
            _forget_reader(session, group.id)
            session.delete(group)
            return {"id": group.id, "object": "group.deleted", "name": group.name, "deleted": True}

    def add_member(self, group_name: str, user_name: str, actor: str) -> dict[str, Any]:
        """A user who is in the group already stays in it."""
        with self._database.write() as session:
            administrator = require_administrator(session, actor)
            group = find_group(session, administrator.tenant, group_name)
            user = find_user(session, group.tenant, user_name)
            session.merge(GroupMember(group_id=group.id, user_id=user.id))
            session.flush()
            return _group_json(session, group)

    def remove_member(self, group_name: str, user_name: str, actor: str) -> dict[str, Any]:
        with self._database.write() as session:
            administrator = require_administrator(session, actor)
            group = find_group(session, administrator.tenant, group_name)
            user = find_user(session, group.tenant, user_name)
            session.execute(delete(GroupMember).where(GroupMember.group_id == group.id, GroupMember.user_id == user.id))
            return _group_json(session, group)


def require_administrator(session: Session, actor: str) -> Reader:
    reader = reader_of(session, actor)
    if not reader.is_administrator:
        raise forbidden("Only the owner and administrators may look after users and groups.", code="not_administrator")
    return reader


def find_user(session: Session, tenant: str | None, name: str) -> User:
    """By name or id; `tenant` None: any."""
    wanted = unicodedata.normalize("NFC", name)
    found = session.get(User, wanted) or session.scalars(select(User).where(User.name == wanted)).one_or_none()
    if found is None or (tenant is not None and found.tenant != tenant):
        raise not_found(f"There is no user {name!r}.", code="unknown_user", param="user")
    return found


def find_group(session: Session, tenant: str | None, name: str) -> Group:
    wanted = unicodedata.normalize("NFC", name)
    found = session.get(Group, wanted) or session.scalars(select(Group).where(Group.name == wanted)).one_or_none()
    if found is None or (tenant is not None and found.tenant != tenant):
        raise not_found(f"There is no group {name!r}.", code="unknown_group", param="group")
    return found


def _checked(name: str, kind: str) -> str:
    cleaned = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(cleaned) or cleaned != cleaned.strip():
        raise invalid(
            f"{name[:80]!r} cannot name a {kind}: use 1 to 100 letters, digits, spaces and . _ @ + -, beginning with a "
            "letter or digit.",
            param="name",
            code="bad_name",
        )
    return cleaned


def _chosen_tenant(administrator: Reader, tenant: str | None) -> str:
    if tenant is None:
        return administrator.tenant or DEFAULT_TENANT
    if not administrator.is_of(tenant):
        raise forbidden("Only the owner of the installation may work in other tenants.", code="other_tenant")
    if not _TENANT.fullmatch(tenant):
        raise invalid(
            f"{tenant[:80]!r} cannot name a tenant: use 1 to 63 small letters, digits and dashes.", param="tenant"
        )
    return tenant


def _check_role(administrator: Reader, role: str) -> None:
    if role not in ROLES:
        raise invalid(f"There is no role {role!r}. There are: {', '.join(ROLES)}.", param="role")
    if role in (OWNER, OPERATOR) and administrator.tenant is not None:
        raise forbidden(
            f"Only the owner of the installation gives the role {role!r}. You may give {ADMINISTRATOR!r}, {MEMBER!r}.",
            code="role_not_yours",
        )


def _spare_the_owner(session: Session, administrator: Reader, user: User, *, stays: bool) -> None:
    if user.role != OWNER or stays:
        return
    if administrator.tenant is not None:
        raise forbidden("Only an owner of the installation may change another one.", code="role_not_yours")
    if session.scalar(select(func.count()).select_from(User).where(User.role == OWNER)) == 1:
        raise conflict(
            "The last owner of the installation cannot go. Make another user owner first.", code="last_owner"
        )


def _hand_over(session: Session, user: User) -> None:
    """What a user brought into collections of others belongs to their owners."""
    for table in (Document, Job):
        owner = select(Collection.owner_id).where(Collection.id == table.collection_id).scalar_subquery()
        session.execute(
            update(table)
            .where(table.owner_id == user.id)
            .values(owner_id=owner)
            .execution_options(synchronize_session=False)
        )


def _forget_reader(session: Session, reader_id: str) -> None:
    """Documents that only this one could read stay without readers: nobody gets a right by a deletion. Their points may
    go on naming an id that nobody has any more, and that is never given again."""
    for table in (CollectionReader, DocumentReader):
        session.execute(delete(table).where(table.reader_id == reader_id))


@contextmanager
def _unique_names(kind: str, name: str) -> Iterator[None]:
    """Says of a database's refusal what it means here."""
    try:
        yield
    except IntegrityError as error:
        raise _name_taken(kind, name) from error


def _name_taken(kind: str, name: str) -> ApiError:
    return conflict(f"The {kind} name {name!r} is taken. Choose another one.", code=f"{kind}_exists", param="name")


def _user_json(session: Session, user: User) -> dict[str, Any]:
    groups = session.execute(
        select(Group.id, Group.name)
        .join(GroupMember, GroupMember.group_id == Group.id)
        .where(GroupMember.user_id == user.id)
        .order_by(Group.name)
    )
    return {
        "id": user.id,
        "object": "user",
        "name": user.name,
        "role": user.role,
        "tenant": user.tenant,
        "groups": [{"id": group_id, "name": name} for group_id, name in groups],
        "created_at": int(user.created_at.timestamp()),
    }


def _group_json(session: Session, group: Group) -> dict[str, Any]:
    members = session.execute(
        select(User.id, User.name)
        .join(GroupMember, GroupMember.user_id == User.id)
        .where(GroupMember.group_id == group.id)
        .order_by(User.name)
    )
    return {
        "id": group.id,
        "object": "group",
        "name": group.name,
        "tenant": group.tenant,
        "members": [{"id": user_id, "name": name} for user_id, name in members],
        "created_at": int(group.created_at.timestamp()),
    }
