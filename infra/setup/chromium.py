"""The browser that the end-to-end tests drive: Debian's Chromium, found or installed where that is allowed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Path of a Chromium that starts. Ubuntu has a stub of that name that only points to its app store."""
    for name in NAMES:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0 and "Chrom" in answer.stdout:
            return path
    return None


def install_chromium(detail: Callable[[str], None]) -> str | None:
    """Install it with apt where this user may. Returns None on success, else why not and what to do."""
    by_hand = "Install it with `sudo apt-get install chromium`."
    if shutil.which("apt-get") is None:
        return "There is no apt-get here; install Chromium in your system's way."
    if os.geteuid() != 0:
        return by_hand
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        detail("apt-get " + " ".join(arguments))
        done = subprocess.run(["apt-get", *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            return f"`apt-get {' '.join(arguments)}` failed: {(done.stderr or done.stdout).strip()[-300:]} {by_hand}"
    return None if find_chromium() else f"apt-get installed something that does not start. {by_hand}"
