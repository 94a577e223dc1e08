"""What our raylets start for every worker, in place of Ray's own script: asks the fork server for one, and ends.

Where there is no fork server, or it does not answer, or the worker wants an environment of its own, the worker is
started as Ray does it. A worker of other code than that of the start gets a fork of that code's own server, never one
that holds the old modules. Standard library only, and little of it: this runs once per worker.
"""

import json
import os
import resource
import socket
import sys

SOCKET_VARIABLE = "WINDFARM_FORK_SERVER"
CODE_VARIABLE = "WINDFARM_CODE"
"""Version of the code that a process imports from its `PYTHONPATH`."""
MAX_MESSAGE = 2**20
TIMEOUT_S = 20.0
LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE")
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def main(arguments: list[str]) -> None:
    context = "{}"
    command = []
    for argument in arguments:
        if argument.startswith(_CONTEXT):
            context = argument.removeprefix(_CONTEXT)
        elif not argument.startswith(_LANGUAGE):
            command.append(argument)
    if wants_an_environment(context):
        start_as_ray_does(arguments)
    path = os.environ.get(SOCKET_VARIABLE)
    if code := other_code(context):
        os.environ.update(code)
        path = path and socket_of(path, code[CODE_VARIABLE])
    if path and not command[0].startswith("-") and ask_for_fork(path, command):
        return
    os.execv(sys.executable, [sys.executable, *command])


def wants_an_environment(context: str) -> bool:
    """Whether this serialized `RuntimeEnvContext` differs from what this very Python is in more than our own code."""
    values = json.loads(context)
    if other_code(context):
        del values["env_vars"]
    return any(value for name, value in values.items() if not (name == "py_executable" and value == sys.executable))


def other_code(context: str) -> dict[str, str]:
    """The variables of a worker that imports other code of ours than this process; empty for any other worker."""
    variables: dict[str, str] = json.loads(context).get("env_vars") or {}
    return variables if variables.keys() == {CODE_VARIABLE, "PYTHONPATH"} else {}


def socket_of(path: str, code: str) -> str:
    """Where the fork server of other code listens, beside that of the start."""
    return f"{path}.{code}"


def start_as_ray_does(arguments: list[str]) -> None:
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None, "a raylet runs"
    script = os.path.join(os.path.dirname(spec.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *arguments])


def ask_for_fork(path: str, command: list[str]) -> bool:
    """Whether the fork server has started this worker."""
    request = {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
    }
    message = json.dumps(request).encode()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(path)
            socket.send_fds(connection, [len(message).to_bytes(4, "big")], [1, 2])
            connection.sendall(message)
            return bool(connection.recv(32))
    except OSError as error:
        sys.stderr.write(f"windfarm: a worker is started without the fork server: {error}\n")
        return False


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes; raises `EOFError` where the other side ends before."""
    parts = []
    while count > 0:
        part = connection.recv(count)
        if not part:
            raise EOFError("the message ended too early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main(sys.argv[1:])
