"""`python -m services.cli`: the command where the package's scripts are not on the path."""

from services.cli import main

main()
