"""A git repository as a source: the newest commit of one branch, read out of a shallow copy that is never checked out.

Without a checkout no hook, filter or link of the repository does anything. git is run with none of the machine's or
user's settings, may speak only the protocols that the operator permits, and asks nobody anything.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from rag.filenames import name_of_path
from services.sync.connector import ConnectorError, Content, Item, Listing, Skipped
from services.sync.ignore import Ignore

_TIMEOUT_S = 300.0
_SCP_LIKE = re.compile(r"[\w.-]+@[\w.-]+:(?!//).+")
_MODES = {"120000": "It is a link; those are not followed.", "160000": "It is another repository (a submodule)."}
_SETTINGS = (
    *("core.hooksPath=/dev/null", "core.fsmonitor=false", "credential.helper=", "protocol.ext.allow=never"),
    *("submodule.recurse=false", "fetch.recurseSubmodules=false", "transfer.bundleURI=false", "gc.auto=0"),
)


class GitConnector:
    """See `Connector`. `schemes`: which of https, ssh and file may be used."""

    interval_s = 300.0

    def __init__(
        self, location: str, schemes: Sequence[str], *, branch: str | None = None, patterns: Sequence[str] = ()
    ) -> None:
        self._location, self._scheme = _checked(location, schemes)
        self._schemes = tuple(schemes)
        if branch is not None and (branch.startswith("-") or not re.fullmatch(r"[\w./+@-]+", branch)):
            raise ConnectorError(f"{branch!r} is no name of a branch.")
        self._branch = branch
        self._ignore = Ignore(patterns)
        self._folder: TemporaryDirectory[str] | None = None
        self._commit: str | None = None
        self.source = f"git:{self._location}" + (f"#{branch}" if branch else "")

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory(prefix="windfarm-git-")
        self._commit = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def list_items(self) -> Listing:
        self._fetch()
        items: list[Item] = []
        skipped: list[Skipped] = []
        for entry in self._git("ls-tree", "-r", "-z", "--long", "--full-tree", "FETCH_HEAD").split(b"\0"):
            if not entry:
                continue
            about, _, raw_path = entry.partition(b"\t")
            mode, kind, blob, size = about.decode("ascii").split()
            path = PurePosixPath(raw_path.decode("utf-8", "replace"))
            if any(part.startswith(".") for part in path.parts) or self._ignore.matches(path, is_folder=False):
                continue
            if why := _MODES.get(mode, None if kind == "blob" else "It is no file."):
                skipped.append(Skipped(str(path), why))
                continue
            # The blob's id stands for the content: an unchanged file is known without reading it.
            origin = f"{self._location}#{path}@{blob}"
            items.append(Item(name_of_path(path.parts), origin, int(size), origin_is_exact=True))
        return Listing(items, skipped)

    def content(self, item: Item) -> Content:
        return Content(self._git("cat-file", "blob", item.origin.rpartition("@")[2]))

    def _fetch(self) -> None:
        """The newest commit of the branch alone, without the files that were there before."""
        if self._commit is None:
            self._git("init", "--bare", "--quiet", "--template=", ".")
        wanted = f"refs/heads/{self._branch}" if self._branch else "HEAD"
        self._git("fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--", self._location, wanted)
        self._commit = self._git("rev-parse", "FETCH_HEAD").decode().strip()

    def _git(self, *arguments: str) -> bytes:
        assert self._folder is not None, "used as a context manager"
        settings = [word for setting in _SETTINGS for word in ("-c", setting)]
        command = ["git", "--bare", f"--git-dir={self._folder.name}", *settings, *arguments]
        try:
            answer = subprocess.run(
                command,
                cwd=self._folder.name,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise ConnectorError("There is no git on this machine. Install it: sudo apt-get install git") from error
        except subprocess.TimeoutExpired as error:
            raise ConnectorError(f"{self._location}: git took longer than {_TIMEOUT_S:.0f} s. Try again.") from error
        if answer.returncode != 0:
            said = " ".join(answer.stderr.decode("utf-8", "replace").split())[:300]
            raise ConnectorError(f"{self._location} cannot be read: {said}. Check the address, branch and access.")
        return answer.stdout

    def _environment(self) -> dict[str, str]:
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "true",
            "GIT_ALLOW_PROTOCOL": ":".join(self._schemes),
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oStrictHostKeyChecking=yes",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_PROTOCOL_FROM_USER": "0",
        }
        # For ssh: keys and known hosts of the user who runs this.
        kept = ("HOME", "SSH_AUTH_SOCK") if self._scheme == "ssh" else ()
        return environment | {name: os.environ[name] for name in kept if name in os.environ}


def _checked(location: str, schemes: Sequence[str]) -> tuple[str, str]:
    """The location as git gets it, and its scheme. Raises `ConnectorError` where it is not permitted."""
    location = location.removeprefix("git+")
    if location.startswith("-") or any(ord(character) < 32 for character in location):
        raise ConnectorError(f"{location!r} is no address of a repository.")
    if "://" in location:
        scheme = location.partition("://")[0].lower()
    elif _SCP_LIKE.fullmatch(location):
        scheme = "ssh"
    else:
        scheme, location = "file", f"file://{Path(location).resolve()}"
    if scheme not in schemes:
        raise ConnectorError(
            f"{location} would be read by {scheme}, but only {', '.join(schemes)} is permitted here "
            "(ingestion.git_schemes in ray_config.yaml)."
        )
    if scheme == "https" and "@" in location.partition("://")[2].partition("/")[0]:
        raise ConnectorError("An address with a password in it would be kept with every document. Leave it out.")
    return location, scheme
