"""How the command line speaks: results on stdout, everything else on stderr, `--json` as one document."""

from __future__ import annotations

import json
import sys
from typing import Any

from cluster.errors import ClusterError
from rag.errors import RagError
from services.setup_errors import SetupError


def say(message: str) -> None:
    """Tell the person something that is not the result."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def put(text: str) -> None:
    """A result for the person."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def put_json(value: Any, *, one_line: bool = False) -> None:
    """A result for a script."""
    put(json.dumps(value, ensure_ascii=False, indent=None if one_line else 2))


def report_error(error: Exception) -> bool:
    """Print an error of ours; False for one that we did not foresee."""
    from services.api_client import ApiFailed

    if isinstance(error, (SetupError, ClusterError, RagError, ApiFailed)):
        say(f"windfarm: {error}")
        return True
    return False
