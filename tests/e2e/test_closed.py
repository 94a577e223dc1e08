"""Closed by default: only loopback, nothing without a key, no connection to anywhere else."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from services.control import read_state
from services.process_environment import NO_TELEMETRY, load_secrets
from services.processes import Process, tagged
from services.ray_adapter import RAY_VARIABLES
from tests.product import Product, connections_file

pytestmark = pytest.mark.e2e

LISTEN, ESTABLISHED, SYN_SENT = "0A", "01", "02"
OPEN_TO_ALL = {"/health", "/ready"}


@dataclass(frozen=True)
class Socket:
    """One TCP socket of one of our processes."""

    pid: int
    local: tuple[str, int]
    remote: tuple[str, int]
    state: str


def processes_of(product: Product) -> list[Process]:
    state = read_state(product.home / "run")
    assert state is not None
    return tagged(state.instance)


def sockets_of(processes: list[Process]) -> Iterator[Socket]:
    for process in processes:
        inodes = set()
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(descriptor.readlink()))
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if f"socket:[{fields[9]}]" in inodes:
                        yield Socket(process.pid, address(fields[1]), address(fields[2]), fields[3])


def address(text: str) -> tuple[str, int]:
    """An address as /proc writes it: words of four bytes in the machine's order."""
    host, port = text.split(":")
    packed = b"".join(bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8))
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed).removeprefix("::ffff:"), int(port, 16)


def is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def listening_ports(product: Product) -> set[int]:
    return {s.local[1] for s in sockets_of(processes_of(product)) if s.state == LISTEN}


def test_every_port_listens_on_loopback_alone(product: Product) -> None:
    listening = [s for s in sockets_of(processes_of(product)) if s.state == LISTEN]
    assert product.port in {s.local[1] for s in listening}
    assert [s for s in listening if not is_loopback(s.local[0])] == []


def test_no_process_talks_to_another_machine(product: Product) -> None:
    httpx.post(
        f"{product.api}/chat/completions",
        headers=product.headers,
        json={"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
        timeout=120,
    ).raise_for_status()
    httpx.get(product.ui, timeout=60).raise_for_status()
    talking = [s for s in sockets_of(processes_of(product)) if s.state in (ESTABLISHED, SYN_SENT)]
    assert talking
    assert [s for s in talking if not is_loopback(s.remote[0])] == []


def test_no_process_has_even_tried_to_reach_another_machine(product: Product) -> None:
    """Since its start, names that were looked up included: see `watched/sitecustomize.py`."""
    noted = connections_file(product.home).read_text().splitlines()
    watching = {int(line.split()[1]) for line in noted if line.startswith("watching ")}
    state = read_state(product.home / "run")
    assert state is not None
    assert state.guardian_pid in watching
    replicas = {process.pid for process in processes_of(product) if "ServeReplica" in title(process)}
    assert replicas
    assert replicas <= watching
    assert [line for line in noted if line.startswith("tried ")] == []


def title(process: Process) -> str:
    return Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").replace("\0", " ")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_port_gives_anything_away_without_a_key(product: Product, method: str) -> None:
    assert given_away(listening_ports(product), product.port, method) == []


def given_away(ports: set[int], public_port: int, method: str) -> list[str]:
    """What the ports answer to somebody without a key, but for errors."""
    paths = (
        "/",
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/generate",
        "/slots",
        "/props",
        "/api/serve/applications/",
        "/get_or_create_runtime_env",
        "/get_runtime_envs_info",
    )
    found = []
    for port in sorted(ports):
        for path in paths:
            if port == public_port and path == "/":
                continue  # the page itself, which shows nothing but the place for the key
            answer = try_http(method, port, path)
            if answer is not None and answer.status_code < 400:
                found.append(f"{method} {port}{path}: {answer.status_code} {answer.text[:80]!r}")
    return found


def try_http(method: str, port: int, path: str) -> httpx.Response | None:
    """None where the port does not speak HTTP."""
    try:
        return httpx.request(method, f"http://127.0.0.1:{port}{path}", json={} if method == "POST" else None, timeout=5)
    except httpx.TransportError:
        return None


# One call of each of Ray's services: head, node, worker, object manager.
RAY_CALLS = {
    "gcs_server": "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "ray::": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "objects": "/ray.rpc.ObjectManagerService/Pull",
}


def test_no_port_of_rays_answers_a_call_without_the_token(product: Product) -> None:
    """gRPC without the token, on every port: whatever knows the call refuses it as unauthenticated."""
    refusals = refusals_of_ray(listening_ports(product))
    assert {name for name, codes in refusals.items() if "OK" in codes} == set()
    assert {name for name, codes in refusals.items() if "UNAUTHENTICATED" not in codes} == set()


def refusals_of_ray(ports: set[int]) -> dict[str, set[str]]:
    """What the ports answer to each of Ray's calls without the token."""
    refusals: dict[str, set[str]] = {}
    for port in sorted(ports):
        for name, method in RAY_CALLS.items():
            refusals.setdefault(name, set()).add(try_grpc(port, method))
    return refusals


def try_grpc(port: int, method: str) -> str:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=5)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_secrets_are_readable_by_their_owner_alone(product: Product) -> None:
    keys = load_secrets(product.home / "run", renew=False)
    assert len(keys.internal) >= 32
    private = [
        product.home / "owner.key",
        *(product.home / "run").glob("*.secret"),
        *(product.home / "run").glob("*.token"),
    ]
    assert {path.stat().st_mode & 0o077 for path in private} == {0}


def test_telemetry_is_off_in_every_process(product: Product) -> None:
    wanted = {**NO_TELEMETRY, **RAY_VARIABLES, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for process in processes_of(product):
        if "Agent" in title(process):
            continue  # Ray's agents write their title over what /proc shows of their environment
        variables = set(Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0"))
        assert {f"{name}={value}" for name, value in wanted.items()} - variables == set(), title(process)
