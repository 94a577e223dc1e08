"""Paths find their handler; names in paths may hold anything."""

import pytest

from services.errors import ApiError
from services.host_check import HostCheck, is_loopback
from services.routing import Answer, Call, Route, Router


async def handler(call: Call) -> Answer:
    return Answer()


ROUTES = [
    Route("GET", "/v1/collections", handler),
    Route("POST", "/v1/collections", handler),
    Route("GET", "/v1/collections/{name}", handler),
    Route("DELETE", "/v1/collections/{name}", handler),
    Route("GET", "/v1/collections/{name}/documents/{id}", handler),
]


@pytest.mark.parametrize(
    ("method", "path", "template", "parameters"),
    [
        ("GET", "/v1/collections", "/v1/collections", {}),
        ("HEAD", "/v1/collections", "/v1/collections", {}),
        ("DELETE", "/v1/collections/a", "/v1/collections/{name}", {"name": "a"}),
        ("GET", "/v1/collections/a%2Fb%20%C3%BC", "/v1/collections/{name}", {"name": "a/b ü"}),
        ("GET", "/v1/collections/a/documents/7", ROUTES[4].template, {"name": "a", "id": "7"}),
    ],
)
def test_a_path_finds_its_route(method: str, path: str, template: str, parameters: dict[str, str]) -> None:
    found = Router(ROUTES).find(method, path)
    assert found is not None
    assert (found[0].template, found[1]) == (template, parameters)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/collections/", "/v1/collections/a/b", "/V1/collections"])
def test_other_paths_are_nobodys_or_name_nothing(path: str) -> None:
    found = Router(ROUTES).find("GET", path)
    assert found is None or found[1] == {"name": ""}


def test_a_known_path_with_another_method_names_what_is_possible() -> None:
    with pytest.raises(ApiError, match="PUT is not possible here, only GET, POST") as refused:
        Router(ROUTES).find("PUT", "/v1/collections")
    assert refused.value.status == 405


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "127.0.0.9", "localhost", "a.localhost:1", "[::1]:8000", "LOCALHOST"]
)
def test_names_of_this_machine_pass(host: str) -> None:
    HostCheck("127.0.0.1").check(host)


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example:8000", "10.0.0.1", "127.0.0.1.evil.example"]
)
def test_names_of_others_are_refused_on_loopback(host: str) -> None:
    with pytest.raises(ApiError) as refused:
        HostCheck("127.0.0.1").check(host)
    assert refused.value.status == 421


def test_a_proxy_in_front_may_pass_its_own_name_and_open_listeners_take_any() -> None:
    HostCheck("127.0.0.1", ["chat.example"]).check("Chat.Example:443")
    HostCheck("0.0.0.0").check("anything.example")
    assert not is_loopback("0.0.0.0")
