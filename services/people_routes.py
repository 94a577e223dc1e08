"""Routes of users, groups, members and the keys of users; for the owner and administrators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from services.accounts import Accounts, KeyInfo
from services.errors import not_found
from services.people import People
from services.routing import Answer, Call, Route, json_answer, list_answer
from services.validation import RequestBody

Name = Annotated[str, Field(min_length=1, max_length=100)]
_MAX_MIB = 1.0


class NewUser(RequestBody):
    name: Name
    role: Annotated[str, Field(max_length=40)] = "member"
    tenant: Annotated[str, Field(max_length=63)] | None = None


class UserChanges(RequestBody):
    role: Annotated[str, Field(max_length=40)]


class NewGroup(RequestBody):
    name: Name
    tenant: Annotated[str, Field(max_length=63)] | None = None


class NewKey(RequestBody):
    name: Name


class PeopleRoutes:
    """`{user}` and `{group}` are names or ids."""

    def __init__(self, people: People, accounts: Accounts) -> None:
        self._people = people
        self._accounts = accounts

    def routes(self) -> list[Route]:
        user, group = "/v1/users/{user}", "/v1/groups/{group}"
        return [
            Route("GET", "/v1/users", self.list_users),
            Route("POST", "/v1/users", self.create_user),
            Route("GET", user, self.get_user),
            Route("PATCH", user, self.change_user),
            Route("DELETE", user, self.delete_user),
            Route("GET", f"{user}/keys", self.list_keys),
            Route("POST", f"{user}/keys", self.create_key),
            Route("DELETE", f"{user}/keys/{{key}}", self.revoke_key),
            Route("GET", "/v1/groups", self.list_groups),
            Route("POST", "/v1/groups", self.create_group),
            Route("GET", group, self.get_group),
            Route("DELETE", group, self.delete_group),
            Route("PUT", f"{group}/members/{{user}}", self.add_member),
            Route("DELETE", f"{group}/members/{{user}}", self.remove_member),
        ]

    async def list_users(self, call: Call) -> Answer:
        return list_answer(await self._ask(call, self._people.list_users))

    async def create_user(self, call: Call) -> Answer:
        new = await call.parse(NewUser, _MAX_MIB)
        return json_answer(await self._ask(call, self._people.create_user, new.name, new.role, new.tenant), 201)

    async def get_user(self, call: Call) -> Answer:
        return json_answer(await self._ask(call, self._people.user, call.parameters["user"]))

    async def change_user(self, call: Call) -> Answer:
        changes = await call.parse(UserChanges, _MAX_MIB)
        return json_answer(await self._ask(call, self._people.change_role, call.parameters["user"], changes.role))

    async def delete_user(self, call: Call) -> Answer:
        return json_answer(await self._ask(call, self._people.delete_user, call.parameters["user"]))

    async def list_keys(self, call: Call) -> Answer:
        return list_answer(await self._ask(call, self._keys_of, call.parameters["user"]))

    async def create_key(self, call: Call) -> Answer:
        """The only answer that holds the key itself."""
        new = await call.parse(NewKey, _MAX_MIB)
        return json_answer(await self._ask(call, self._make_key, call.parameters["user"], new.name), 201)

    async def revoke_key(self, call: Call) -> Answer:
        parameters = call.parameters
        return json_answer(await self._ask(call, self._revoke_key, parameters["user"], parameters["key"]))

    async def list_groups(self, call: Call) -> Answer:
        return list_answer(await self._ask(call, self._people.list_groups))

    async def create_group(self, call: Call) -> Answer:
        new = await call.parse(NewGroup, _MAX_MIB)
        return json_answer(await self._ask(call, self._people.create_group, new.name, new.tenant), 201)

    async def get_group(self, call: Call) -> Answer:
        return json_answer(await self._ask(call, self._people.group, call.parameters["group"]))

    async def delete_group(self, call: Call) -> Answer:
        return json_answer(await self._ask(call, self._people.delete_group, call.parameters["group"]))

    async def add_member(self, call: Call) -> Answer:
        parameters = call.parameters
        return json_answer(await self._ask(call, self._people.add_member, parameters["group"], parameters["user"]))

    async def remove_member(self, call: Call) -> Answer:
        parameters = call.parameters
        return json_answer(await self._ask(call, self._people.remove_member, parameters["group"], parameters["user"]))

    async def _ask(self, call: Call, what: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(what, *args, call.actor.user_id)

    def _keys_of(self, user: str, actor: str) -> list[dict[str, Any]]:
        return [_key_json(info) for info in self._accounts.list_keys(self._people.managed_user_id(user, actor))]

    def _make_key(self, user: str, name: str, actor: str) -> dict[str, Any]:
        user_id = self._people.managed_user_id(user, actor)
        key = self._accounts.create_key(user_id, name)
        made = next(info for info in self._accounts.list_keys(user_id) if key.startswith(info.prefix))
        return _key_json(made) | {"key": key}

    def _revoke_key(self, user: str, key_id: str, actor: str) -> dict[str, Any]:
        user_id = self._people.managed_user_id(user, actor)
        if key_id not in {info.id for info in self._accounts.list_keys(user_id)}:
            raise not_found(f"{user!r} has no api key {key_id!r}.", code="key_not_found")
        self._accounts.revoke_key(key_id)
        return {"id": key_id, "object": "api_key.revoked", "revoked": True}


def _key_json(info: KeyInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "object": "api_key",
        "name": info.name,
        "prefix": info.prefix,
        "created_at": int(info.created_at.timestamp()),
        "revoked_at": int(info.revoked_at.timestamp()) if info.revoked_at else None,
    }
