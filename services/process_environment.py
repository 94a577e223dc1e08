"""The variables that every process of a windfarm gets: its own settings, Ray's token, no telemetry, no outward calls.

`windfarm up` sets them for the guardian, from which all inherit them; `windfarm env` prints the same ones.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.code_copies import REPOSITORY
from services.environment import SECRET_VARIABLE
from services.processes import started_with
from services.ray_adapter import RAY_VARIABLES
from services.ray_config import RayConfig

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
# Python runs the `sitecustomize` in it.
STARTUP = REPOSITORY / "services" / "startup"

NO_TELEMETRY: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "OTEL_SDK_DISABLED": "true",
}
# Where vLLM keeps what it compiles for a GPU, below the data folder; by default it lies in several other places.
COMPILED: Mapping[str, str] = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
# Variables of the caller's shell that would make our processes join or trust another Ray.
_FOREIGN = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")


@dataclass(frozen=True, slots=True)
class Secrets:
    """Made anew at each start: what internal ports and Ray demand."""

    internal: str
    ray_token: str


def load_secrets(run: Path, *, renew: bool) -> Secrets:
    """The secrets in the data folder, readable by their owner alone; made where there are none or `renew` asks."""
    internal, token = run / "internal.secret", run / "ray.token"
    if renew or not internal.exists() or not token.exists():
        for path in (internal, token):
            _write_private(path, secrets.token_urlsafe(32))
    return Secrets(internal.read_text(encoding="ascii"), token.read_text(encoding="ascii"))


def secrets_in_use(run: Path) -> bool:
    """Whether a process lives that was started with the present secrets: a windfarm, however it was started."""
    path = run / "internal.secret"
    return path.exists() and bool(started_with(SECRET_VARIABLE, path.read_text(encoding="ascii")))


def process_variables(
    home: Path, keys: Secrets, config: RayConfig, given: Mapping[str, str], code: Path = REPOSITORY
) -> dict[str, str]:
    """What to add to the environment. `given` are settings of the caller, such as `WINDFARM_PORT`; `code` is the
    folder that our packages are imported from."""
    variables = {
        **NO_TELEMETRY,
        **RAY_VARIABLES,
        TOKEN_VARIABLE: keys.ray_token,
        SECRET_VARIABLE: keys.internal,
        "WINDFARM_HOME": str(home),
        # Uploads pass through the page's process; its default is a folder that all users of the machine share.
        "GRADIO_TEMP_DIR": str(home / "run" / "page"),
        "PYTHONPATH": python_path(code, os.environ.get("PYTHONPATH", "")),
        **{name: os.environ.get(name) or str(home / "cache" / folder) for name, folder in COMPILED.items()},
        # Engines rename themselves: the title would be written over the environment, and over the tag by which `down`
        # finds them.
        "SPT_NOENV": "1",
        **given,
    }
    if not uses_hub(config):
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return variables


def full_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment with ours on top, without what points to another Ray."""
    return {key: value for key, value in os.environ.items() if key not in _FOREIGN} | dict(variables)


def uses_hub(config: RayConfig) -> bool:
    """Whether a model comes from a hub, so that its libraries may go there."""
    sources = [config.app.embed.source, *(model.source for model in config.app.models.values())]
    return any(source.startswith("hf:") for source in sources)


def python_path(code: Path, before: str) -> str:
    """`before` with the code in front of it. Its start-up folder comes last: a `sitecustomize` that the operator has on
    the path takes precedence."""
    parts = [str(code), *(before.split(os.pathsep) if before else []), str(code / STARTUP.relative_to(REPOSITORY))]
    return os.pathsep.join(dict.fromkeys(parts))


def _write_private(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    draft.replace(path)
