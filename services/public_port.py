"""The public port outlives whoever serves it: windfarm's own process holds the listening socket and lends it.

A relay that is replaced, restarted or killed closes only its copy. Connections that come meanwhile wait in the kernel's
queue for the next relay; had each relay a socket of its own, those that it has not taken yet would be reset. Several
relays take connections from the same queue, whoever is free first. Where nobody lends (a hand-started `serve run`),
the relay opens the port itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path

from services.config import Environment
from services.listener import ListenError, bind_socket, bind_socket_in

_ANSWER_S = 30.0
_MAX_LINE = 4096

_Address = tuple[str, int, str]


class PortLender:
    """Answers each request on the Unix socket at `path`, which only its user may open, with a bound socket.

    A socket is made when it is first asked for and kept until `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._sockets: dict[_Address, socket.socket] = {}
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._server.bind(str(path))
        finally:
            os.umask(before)
        self._server.listen()
        self._thread = threading.Thread(target=self._lend_for_ever, name="ports", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody listens at the ports any more once the borrowers have ended as well."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()
        for sock in self._sockets.values():
            sock.close()

    def _lend_for_ever(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(_ANSWER_S)
                self._lend(connection)

    def _lend(self, connection: socket.socket) -> None:
        host, port, namespace = json.loads(connection.recv(_MAX_LINE))
        address = (str(host), int(port), str(namespace))
        try:
            sock = self._sockets.get(address) or _bind(address)
        except ListenError as error:
            connection.sendall(str(error).encode())
            return
        self._sockets[address] = sock
        socket.send_fds(connection, [b"ok"], [sock.fileno()])


def _bind(address: _Address, *, reuse_port: bool = False) -> socket.socket:
    host, port, namespace = address
    if namespace:
        return bind_socket_in(Path(namespace), host, port, reuse_port=reuse_port)
    return bind_socket(host, port, reuse_port=reuse_port)


def public_socket(environment: Environment, host: str, port: int, namespace: Path | None = None) -> socket.socket:
    """The bound socket of `host`:`port` (in another network namespace, where one is named), lent where somebody
    lends. Raises `ListenError`."""
    address = (host, port, str(namespace or ""))
    if environment.ports is None:
        return _bind(address, reuse_port=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_S)
        connection.connect(str(environment.ports))
        connection.sendall(json.dumps(address).encode())
        answer, descriptors, _, _ = socket.recv_fds(connection, _MAX_LINE, 1)
    if not descriptors:
        raise ListenError(answer.decode() or "windfarm's own process ended while it was asked for the public port.")
    os.set_inheritable(descriptors[0], False)
    lent = socket.socket(fileno=descriptors[0])
    lent.setblocking(False)
    return lent
