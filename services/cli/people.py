"""`user` and `group`: who may use windfarm, and who belongs together."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.cli.options import ApiOption, HomeOption, JsonOption, KeyOption
from services.cli.output import put, put_json, say

users = typer.Typer(name="user", help="Users and their keys; for the owner and administrators.", no_args_is_help=True)
groups = typer.Typer(name="group", help="Groups of users; for the owner and administrators.", no_args_is_help=True)

UserArgument = Annotated[str, typer.Argument(metavar="USER", help="Name or id of a user.")]
GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Name or id of a group.")]
RoleOption = Annotated[str, typer.Option(help="owner, administrator, operator or member.")]
TenantOption = Annotated[
    str | None, typer.Option(help="Who works in another tenant sees nothing of this one.", show_default="your own")
]


@users.command("list")
def list_users(
    home: HomeOption = None, api: ApiOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """List users with their roles and groups."""
    found = _ask(home, api, key, "GET", "/v1/users")["data"]
    _show({"users": found}, [_user_line(user) for user in found], as_json=as_json)


@users.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="How the user is called; must not be taken.")],
    role: RoleOption = "member",
    tenant: TenantOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a user with a key, which is shown this once."""
    body = {"name": name, "role": role} | ({"tenant": tenant} if tenant is not None else {})
    user = _ask(home, api, key, "POST", "/v1/users", body)
    made = _ask(home, api, key, "POST", f"/v1/users/{user['id']}/keys", {"name": "first key"})
    if not as_json:
        say(
            f"{user['name']} ({user['id']}) is {user['role']} in the tenant {user['tenant']}. The key, shown this once:"
        )
    _show(user | {"key": made["key"]}, [made["key"]], as_json=as_json)


@users.command("role")
def change_role(
    user: UserArgument,
    role: Annotated[str, typer.Argument(help="owner, administrator, operator or member.")],
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a user another role; it holds at once."""
    changed = _ask(home, api, key, "PATCH", _user(user), {"role": role})
    _show(changed, [_user_line(changed)], as_json=as_json)


@users.command("remove")
def remove_user(
    user: UserArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a user with keys, conversations and rights; not while the user owns collections."""
    gone = _ask(home, api, key, "DELETE", _user(user))
    _show(gone, [f"{gone['name']} is removed."], as_json=as_json)


@users.command("key")
def keys_of(
    user: UserArgument,
    new: Annotated[str | None, typer.Option(metavar="NAME", help="Make another key; it is shown this once.")] = None,
    revoke: Annotated[str | None, typer.Option(metavar="ID", help="Make a key useless, within seconds.")] = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys of a user, make one, or revoke one."""
    keys = f"{_user(user)}/keys"
    if new is not None:
        made = _ask(home, api, key, "POST", keys, {"name": new})
        _show(made, [made["key"]], as_json=as_json)
    elif revoke is not None:
        gone = _ask(home, api, key, "DELETE", f"{keys}/{quote(revoke, safe='')}")
        _show(gone, [f"{revoke} is revoked."], as_json=as_json)
    else:
        found = _ask(home, api, key, "GET", keys)["data"]
        _show({"keys": found}, [_key_line(each) for each in found], as_json=as_json)


@groups.command("list")
def list_groups(
    home: HomeOption = None, api: ApiOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """List groups with their members."""
    found = _ask(home, api, key, "GET", "/v1/groups")["data"]
    _show({"groups": found}, [_group_line(group) for group in found], as_json=as_json)


@groups.command("add")
def add_group(
    name: Annotated[str, typer.Argument(help="How the group is called; must not be taken.")],
    tenant: TenantOption = None,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a group."""
    body = {"name": name} | ({"tenant": tenant} if tenant is not None else {})
    group = _ask(home, api, key, "POST", "/v1/groups", body)
    _show(group, [_group_line(group)], as_json=as_json)


@groups.command("remove")
def remove_group(
    group: GroupArgument,
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a group; its members lose what they could read through it."""
    gone = _ask(home, api, key, "DELETE", _group(group))
    _show(gone, [f"{gone['name']} is removed."], as_json=as_json)


@groups.command("join")
def join_group(
    group: GroupArgument,
    members: Annotated[list[str], typer.Argument(metavar="USER...", help="Names or ids of users.")],
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put users into a group; what it may read, they may read at once."""
    _change_members("PUT", group, members, home, api, key, as_json=as_json)


@groups.command("leave")
def leave_group(
    group: GroupArgument,
    members: Annotated[list[str], typer.Argument(metavar="USER...", help="Names or ids of users.")],
    home: HomeOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take users out of a group; what they could read through it is gone for them at once."""
    _change_members("DELETE", group, members, home, api, key, as_json=as_json)


def _change_members(
    method: str, group: str, members: list[str], home: Any, api: Any, key: Any, *, as_json: bool
) -> None:
    changed: dict[str, Any] = {}
    for member in members:
        changed = _ask(home, api, key, method, f"{_group(group)}/members/{quote(member, safe='')}")
    _show(changed, [_group_line(changed)], as_json=as_json)


def _ask(home: Any, api: Any, key: Any, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    from services.cli.client import open_client

    with open_client(home, api, key) as client:
        return client.request(method, path, body)


def _show(value: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    if as_json:
        put_json(value)
        return
    for line in lines:
        put(line)


def _user(name: str) -> str:
    return f"/v1/users/{quote(name, safe='')}"


def _group(name: str) -> str:
    return f"/v1/groups/{quote(name, safe='')}"


def _user_line(user: dict[str, Any]) -> str:
    groups_of = ", ".join(group["name"] for group in user["groups"]) or "no groups"
    return f"{user['id']}  {user['name']:24} {user['role']:14} {user['tenant']:12} {groups_of}"


def _group_line(group: dict[str, Any]) -> str:
    members = ", ".join(member["name"] for member in group["members"]) or "no members"
    return f"{group['id']}  {group['name']:24} {group['tenant']:12} {members}"


def _key_line(key: dict[str, Any]) -> str:
    return f"{key['id']}  {key['prefix']}...  {key['name']}{' (revoked)' if key['revoked_at'] else ''}"
