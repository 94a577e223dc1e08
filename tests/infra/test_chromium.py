"""Set-up finds a Chromium or installs Debian's, and where it may not or cannot it says why and what to do.

`apt-get` and the browsers are small scripts in the only folder of the PATH.
"""

import io
import os
from pathlib import Path

import pytest

from infra.setup.chromium import find_chromium
from infra.setup.program import prepare_browser
from infra.setup.progress import Progress

BROWSER = 'echo "Chromium 142.0 built on Debian"'
STUB = "echo \"Command '$0' requires the chromium snap to be installed.\" >&2; exit 1"
BY_HAND = "Install it with `sudo apt-get install chromium`."


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("DEBIAN_FRONTEND", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return folder


def add(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def add_apt(folder: Path, installs: str = "", update: str = "") -> Path:
    """An apt-get whose `install` makes the browser `installs`. The file that it notes its calls in."""
    calls = folder / "calls"
    browser = folder / "chromium"
    program = f"#!/bin/sh\n{installs}\n"
    add(
        folder,
        "apt-get",
        f'echo "$DEBIAN_FRONTEND $*" >> "{calls}"\n'
        f'if [ "$1" = update ]; then {update or ":"}; exit; fi\n'
        f"/bin/cat > \"{browser}\" <<'END'\n{program}END\n"
        f'/bin/chmod +x "{browser}"',
    )
    return calls


def told() -> str:
    """What set-up says of the browser."""
    output = io.StringIO()
    prepare_browser(Progress(1, output))
    return output.getvalue().strip()


def test_a_chromium_that_starts_is_taken_and_nothing_is_installed(programs: Path) -> None:
    add(programs, "chromium-browser", STUB)
    browser = add(programs, "google-chrome", 'echo "Google Chrome 142.0"')
    calls = add_apt(programs)
    assert told() == ""
    assert find_chromium() == str(browser)
    assert not calls.exists()


def test_root_gets_debians_chromium_and_is_asked_nothing(programs: Path) -> None:
    calls = add_apt(programs, installs=BROWSER)
    assert told() == ""
    assert find_chromium() == str(programs / "chromium")
    install = "noninteractive install -y --no-install-recommends chromium"
    assert calls.read_text().splitlines() == ["noninteractive update", install]


def test_another_user_is_told_the_command(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    calls = add_apt(programs, installs=BROWSER)
    assert told() == f"No Chromium: the browser tests are left out. {BY_HAND}"
    assert not calls.exists()


def test_a_system_without_apt_is_told_so(programs: Path) -> None:
    add(programs, "chromium", STUB)
    assert told().endswith("There is no apt-get here; install Chromium in your system's way.")


def test_what_apt_says_when_it_fails_is_repeated(programs: Path) -> None:
    calls = add_apt(programs, installs=BROWSER, update="echo 'Could not resolve deb.example.org' >&2; exit 100")
    assert told().endswith(f"`apt-get update` failed: Could not resolve deb.example.org {BY_HAND}")
    assert len(calls.read_text().splitlines()) == 1


def test_ubuntus_stub_is_not_taken_for_a_browser(programs: Path) -> None:
    add_apt(programs, installs=STUB)
    assert told().endswith(f"apt-get installed something that does not start. {BY_HAND}")
    assert find_chromium() is None
