"""Start of set-up: `python3 -m infra.setup`. Must run on any Python 3, also one too old for windfarm itself.

Finds an interpreter of a supported version and hands over to it; everything else is in the other modules.
"""

import os
import sys


def main():  # type: ignore[no-untyped-def]  # annotations of ours must not meet an old parser
    if sys.version_info < (3, 8):
        sys.exit(
            "windfarm needs Python 3.11 to 3.13; this is Python %d.%d.\n"
            "What to do: install a newer one (Debian 12, Ubuntu 24.04: sudo apt-get install python3 python3-venv) and\n"
            "run again; PYTHON=/path/to/python3.12 make up picks a certain one." % sys.version_info[:2]
        )
    from infra.setup.checks import SUPPORTED, SetupProblem, choose_python

    if "%d.%d" % sys.version_info[:2] not in SUPPORTED:
        try:
            python = choose_python()
        except SetupProblem as problem:
            sys.exit("%s\nWhat to do: %s" % (problem, problem.fix))
        os.execv(python, [python, "-m", "infra.setup"] + sys.argv[1:])

    from infra.setup.program import main as set_up

    sys.exit(set_up(sys.argv[1:]))


if __name__ == "__main__":
    main()
