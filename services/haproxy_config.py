"""The configuration of the HAProxy that stands before several relays. Pure.

Each request goes to the relay with the fewest connections. What a relay has not accepted goes to another one; what it
has accepted is never sent twice. HAProxy's own errors have OpenAI's shape, so clients wait and try again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import urlsplit

# A stream may be silent for long only where nobody sends comments; whole answers are silent until they are there.
LONGEST_SILENCE = "1h"
_ERRORS = {
    400: ("invalid_request_error", "bad_request", "The request could not be read. Send HTTP/1.1 with a valid head."),
    408: ("invalid_request_error", "request_timeout", "The request did not come to its end in time. Send it again."),
    500: ("server_error", "balancer_failed", "The load balancer failed. Try again; its log says why."),
    502: ("server_error", "relay_lost", "The process that worked on this request was lost. Try again."),
    503: ("service_unavailable", "no_relay", "No process of the endpoint takes requests at the moment. Try again."),
    504: ("server_error", "relay_silent", "The process that worked on this request gave no answer. Try again."),
}


def haproxy_config(listen_fd: int, relays: Sequence[tuple[str, str]]) -> str:
    """The text of the file. `listen_fd`: a bound socket that HAProxy inherits. `relays`: id and URL of each."""
    lines = [_HEAD.format(silence=LONGEST_SILENCE)]
    lines += [_error(status, *error) for status, error in _ERRORS.items()]
    lines += ["", "frontend public", f"    bind fd@{listen_fd}", "    default_backend relays", "", _BACKEND]
    for relay_id, url in sorted(relays):
        lines.append(f"    server {relay_id} {urlsplit(url).netloc} check inter 1s fall 2 rise 1")
    return "\n".join(lines) + "\n"


def _error(status: int, type_: str, code: str, message: str) -> str:
    body = json.dumps({"error": {"message": message, "type": type_, "param": None, "code": code}})
    quoted = body.replace("\\", "\\\\").replace("'", "'\\''")
    retry = " hdr Retry-After 1" if status == 503 else ""
    return f"    http-error status {status} content-type application/json string '{quoted}'{retry}"


_HEAD = """\
global
    fd-hard-limit 20000
    hard-stop-after {silence}

defaults
    mode http
    timeout connect 5s
    timeout client {silence}
    timeout server {silence}
    timeout tunnel {silence}
    timeout http-request 60s
    timeout http-keep-alive 75s
    timeout queue 5s
    timeout check 5s
    option http-keep-alive
    option abortonclose
    option redispatch 1
    retries 3
    retry-on conn-failure
    option forwardfor"""

_BACKEND = """\
backend relays
    balance leastconn
    http-reuse safe
    option httpchk
    http-check send meth GET uri /health ver HTTP/1.1 hdr Host 127.0.0.1"""
