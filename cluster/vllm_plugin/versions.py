"""Which versions of vLLM the CPU parts know. They change private parts of vLLM, so another version is refused."""

from __future__ import annotations

from cluster.errors import ClusterError

KNOWN_VERSIONS = ("0.29.0",)


def installed_version() -> str:
    """Without what a local build adds ("0.29.0+cpu" is 0.29.0)."""
    from vllm.version import __version__

    return str(__version__).split("+", 1)[0]


def is_known_version() -> bool:
    return installed_version() in KNOWN_VERSIONS


def check_version(wanted_for: str) -> None:
    """Raises `ClusterError` on a version of vLLM that the parts were not written for."""
    if not is_known_version():
        raise ClusterError(
            f"{wanted_for} on CPU needs vLLM {' or '.join(KNOWN_VERSIONS)}, but {installed_version()} is installed: "
            "windfarm does not know its private parts and would compute wrong numbers. Install the locked version "
            "(make setup), or turn expert parallelism off."
        )
