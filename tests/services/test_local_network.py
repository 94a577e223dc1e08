"""Nodes of one machine get networks of their own that lead nowhere, and nothing of them is left behind."""

import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.listener import ListenError, bind_socket_in
from services.local_network import (
    Seat,
    delete_network,
    interfaces,
    loopback_seats,
    make_network,
    namespace_seats,
    namespaces,
)


def test_without_namespaces_each_node_has_a_loopback_address_of_its_own() -> None:
    assert [seat.address for seat in loopback_seats(3)] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert Seat("127.0.0.2").command(["true"]) == ["true"]


@pytest.fixture
def tag() -> Iterator[str]:
    tag = secrets.token_hex(8)
    yield tag
    delete_network(tag)


def read_from(address: str) -> str | None:
    """What answers at this address from where the test runs: the way to the outside may lead to anything."""
    try:
        with socket.create_connection((address, 7), timeout=0.5) as connection:
            return connection.recv(99).decode(errors="replace")
    except OSError:
        return None


@pytest.mark.requires("namespaces")
def test_nodes_reach_each_other_and_the_machine_reaches_none(tag: str) -> None:
    make_network(tag, 2)
    first, second = namespace_seats(tag, 2)
    server = f"""import socket
s = socket.create_server(('{first.address}', 7))
print('up', flush=True)
s.accept()[0].sendall(b'{tag}')
"""
    process = subprocess.Popen(first.command([sys.executable, "-c", server]), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert read_from(first.address) != tag
        client = f"import socket; print(socket.create_connection(('{first.address}', 7), timeout=10).recv(99).decode())"
        answer = subprocess.run(
            second.command([sys.executable, "-c", client]), capture_output=True, text=True, timeout=30
        )
        assert answer.stdout.strip() == tag
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.requires("namespaces")
def test_two_networks_do_not_disturb_each_other_and_nothing_is_left(tag: str) -> None:
    other = secrets.token_hex(8)
    try:
        make_network(tag, 2)
        make_network(other, 2)
        delete_network(tag)
        assert namespaces(tag) == interfaces(tag) == []
        assert len(namespaces(other)) == 2
        assert len(interfaces(other)) == 3
    finally:
        delete_network(other)
    assert namespaces(other) == interfaces(other) == []
    delete_network(other)


@pytest.mark.requires("namespaces")
def test_a_port_is_opened_in_another_namespace_and_in_no_other(tag: str) -> None:
    make_network(tag, 1)
    (seat,) = namespace_seats(tag, 1)
    with bind_socket_in(Path(f"/run/netns/{seat.namespace}"), seat.address, 0) as bound:
        assert bound.getsockname()[0] == seat.address
        with socket.socket() as mine, pytest.raises(OSError):
            mine.bind((seat.address, 0))
        with pytest.raises(ListenError):
            bind_socket_in(Path(f"/run/netns/{seat.namespace}"), "192.0.2.1", 0)
