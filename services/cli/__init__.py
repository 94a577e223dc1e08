"""The command `windfarm`. Commands live in modules by subject; each imports what it needs when it runs, so that
`--help` is quick.
"""

from __future__ import annotations

import sys

from services.cli.output import report_error


def main() -> None:
    """Run the command line; errors of ours become one message and exit code 1."""
    from services.cli.commands import app

    try:
        app()
    except Exception as error:  # the last stop: unknown errors are raised again
        if not report_error(error):
            raise
        sys.exit(1)


__all__ = ["main"]
