"""Python imports this at its start where the folder is on PYTHONPATH: it notes every attempt to reach another machine.

Each process appends to the file in WATCH_CONNECTIONS: `watching PID`, then one line for each name that it looks up,
each stream that it connects and each datagram that it sends, unless the other end is this machine. Noted are tries,
whether or not they succeed. Standard library only, and nothing is kept from happening: the `sitecustomize` that Python
would have run without this one is run after it.
"""

import importlib.util
import os
import sys

FILE = os.environ.get("WATCH_CONNECTIONS")
STREAM = 1
LOCAL = ("127.", "::1", "::ffff:127.", "0.0.0.0", "localhost", "ip6-localhost")


def is_local(host: object) -> bool:
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host or "localhost")
    return text in ("", "::", os.uname().nodename) or text.startswith(LOCAL)


def tried(event: str, arguments: tuple) -> object:
    """The other machine that this event is about, or None."""
    if event == "socket.getaddrinfo" or event.startswith("socket.gethostby"):
        return None if is_local(arguments[0]) or is_number(arguments[0]) else arguments[0]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        socket, address = arguments[0], arguments[1]
        # Connecting a datagram socket sends nothing: it is how programs ask for their own address.
        if not isinstance(address, tuple) or (event == "socket.connect" and socket.type != STREAM):
            return None
        return None if is_local(address[0]) else address
    return None


def is_number(host: object) -> bool:
    """Whether this is an address, for which nobody has to be asked."""
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    return ":" in text or text.replace(".", "").isdecimal()


def note(line: str) -> None:
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (line + "\n").encode())
    finally:
        os.close(file)


def watch(event: str, arguments: tuple) -> None:
    if event.startswith("socket.") and (other := tried(event, arguments)) is not None:
        note(f"tried {os.getpid()} {event} {other} {' '.join(sys.argv)[:120]}")


def note_process() -> None:
    note(f"watching {os.getpid()}")


def run_the_next_one():
    """Python runs only the first `sitecustomize` on its path, and the product has one of its own there."""
    here = os.path.dirname(os.path.abspath(__file__))
    for folder in sys.path:
        file = os.path.join(folder, "sitecustomize.py")
        if os.path.abspath(folder) != here and os.path.isfile(file):
            specification = importlib.util.spec_from_file_location("next_sitecustomize", file)
            specification.loader.exec_module(importlib.util.module_from_spec(specification))
            return


run_the_next_one()
if FILE:
    note_process()
    sys.addaudithook(watch)
    os.register_at_fork(after_in_child=note_process)
