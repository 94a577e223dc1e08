"""Brings what our code logs into the file that Ray Serve keeps for each replica, where `windfarm logs` reads it.

Serve writes only its own logger there; everything else would be lost or end in a file that nobody looks at.
"""

from __future__ import annotations

import logging

_SERVE = "ray.serve"
_OURS = ("windfarm", "services", "cluster", "rag")


def log_into_replica_file(level: int = logging.INFO) -> None:
    """To be called once in the constructor of a deployment, when Serve has set up its logger. Safe to call twice."""
    handlers = list(logging.getLogger(_SERVE).handlers)
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = False
