"""Looks at the machine before anything starts: is there a port, memory, CPU and disk for what the file asks for?

Each finding says what is needed, what is there, and what to do. Nothing is changed, except that a port is tried.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.catalogue import resolve
from cluster.engines.embedding_choice import candidates_here
from cluster.errors import ClusterError
from cluster.weights.checkpoint_check import check_checkpoint
from services.config import ModelConfig
from services.listener import ListenError, bind_socket
from services.ray_config import ActorOptions, RayConfig
from services.resources import (
    BALANCER,
    EMBEDDING,
    GATEWAY,
    GIB,
    MIB,
    PAGE,
    STORE,
    Resources,
    count_gpus,
    model_resources,
)
from services.sharding import is_sharded

# Ray's head, Serve's controller, the guardian.
OVERHEAD_BYTES = 900 * MIB
OBJECT_STORE_BYTES = 160 * MIB
MIN_DISK_BYTES = 500 * MIB
FIXED = {
    ("store", "Store"): STORE,
    ("embed", "Embedding"): EMBEDDING,
    ("platform", "Gateway"): GATEWAY,
    ("platform", "Ui"): PAGE,
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there for windfarm to use."""

    num_cpus: int
    num_gpus: int
    total_memory: int
    free_memory: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What the replicas of one deployment ask for together."""

    application: str
    deployment: str
    replicas: int
    each: Resources


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; `fix` is empty when all is well."""

    name: str
    is_ok: bool
    text: str
    fix: str = ""


def read_machine() -> Machine:
    """CPUs this process may use, memory that is free or can be freed, within the limits of a container."""
    facts = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        facts[name] = int(value.split()[0]) * 1024
    total, free = facts["MemTotal"], facts["MemAvailable"]
    limit, used = _container_memory()
    if limit is not None:
        total, free = min(total, limit), min(free, limit - used)
    return Machine(len(os.sched_getaffinity(0)), count_gpus(), total, max(0, free))


def demands(config: RayConfig, home: Path) -> list[Demand]:
    """What every deployment asks for. `home` is the data folder. Raises `ClusterError` for a model that cannot be."""
    found = []
    for entry in config.applications:
        names = [name for app, name in FIXED if app == entry.name] or ["ModelServer"]
        for name in names:
            override = config.override(entry.name, name)
            each = FIXED.get((entry.name, name)) or model_resources(_model(config, entry.name), home, ask_hub=True)
            replicas = _model(config, entry.name).data_parallel_size if name == "ModelServer" else 1
            if override is not None:
                if override.ray_actor_options is not None:
                    options = override.ray_actor_options
                    each = Resources(options.num_cpus, int(options.memory), options.num_gpus or 0.0)
                first = override.first_replicas
                replicas = replicas if first is None else first
            found.append(Demand(entry.name, name, replicas, each))
    if config.app.platform.listen.balancer == "haproxy":
        found.append(Demand("platform", "Balancer", 1, BALANCER))
    return found


def check_resources(wanted: list[Demand], machine: Machine) -> list[Finding]:
    """CPU, GPU and memory, each as one finding that lists who asks for how much."""
    cpus = sum(d.replicas * d.each.num_cpus for d in wanted)
    gpus = sum(d.replicas * d.each.num_gpus for d in wanted)
    memory = sum(d.replicas * d.each.memory for d in wanted) + OVERHEAD_BYTES + OBJECT_STORE_BYTES
    lower = "Lower the shares or replicas in ray_config.yaml, or take an application out"
    found = [
        Finding(
            "cpu",
            cpus <= machine.num_cpus + 1e-6,
            f"{cpus:g} CPUs are asked for ({_list(wanted, 'num_cpus')}), the machine has {machine.num_cpus}",
            f"{lower}.",
        ),
        Finding(
            "memory",
            memory <= machine.free_memory,
            f"{memory / GIB:.1f} GiB are asked for ({_list(wanted, 'memory')}, Ray {OVERHEAD_BYTES / GIB:.1f}), "
            f"{machine.free_memory / GIB:.1f} of {machine.total_memory / GIB:.1f} GiB are free",
            f"End other programs. {lower}. A model takes less with a smaller max_context or fewer parallel_requests.",
        ),
    ]
    if gpus:
        text = f"{gpus:g} GPUs are asked for, the machine has {machine.num_gpus}"
        found.append(Finding("gpu", gpus <= machine.num_gpus, text, f"{lower}, or set engine: llamacpp."))
    return found


def check_port(address: tuple[str, int]) -> Finding:
    """Whether the public address can be bound now."""
    host, port = address
    try:
        bind_socket(host, port).close()
    except ListenError as error:
        return Finding("port", False, str(error).rstrip("."), f"For example: windfarm up --port {_free_port(host)}")
    return Finding("port", True, f"{host}:{port} is free")


def check_disk(home: Path) -> Finding:
    free = shutil.disk_usage(_existing(home)).free
    text = f"{free / GIB:.1f} GiB are free below {home}, {MIN_DISK_BYTES / GIB:.1f} GiB are needed"
    return Finding("disk", free >= MIN_DISK_BYTES, text, "Free some space, or name another folder with --home.")


def check_models(config: RayConfig, home: Path) -> Iterator[Finding]:
    """Whether each model of the file exists, and a checkpoint's tensors are what its config says."""
    yield from _check_chat_models(config, home)
    embed = config.app.embed
    options = _actor_options(config, "embed", "Embedding")
    has_gpu = bool(options is not None and options.num_gpus)
    try:
        candidates, reason = candidates_here(resolve(embed.source), embed.precision, has_gpu=has_gpu)
    except ClusterError as error:
        yield Finding("embedding model", False, str(error), "Correct the section of `embed` in ray_config.yaml.")
    else:
        names = " or ".join(candidate.name for candidate in candidates)
        yield Finding("embedding model", True, f"{embed.source}, runs as {names}: {reason}")


def _check_chat_models(config: RayConfig, home: Path) -> Iterator[Finding]:
    for model in config.app.models.values():
        try:
            each = model_resources(model, home, ask_hub=True)
            resolved = resolve(model.source)
            if resolved.origin == "folder" and resolved.formats == ("hf",) and resolved.path is not None:
                check_checkpoint(resolved.path)
        except ClusterError as error:
            yield Finding(f"model {model.id}", False, str(error), "Correct its section in ray_config.yaml.")
        else:
            options = _actor_options(config, f"llm-{model.id}", "ModelServer")
            if each.num_gpus and options is not None and options.num_gpus is None and not is_sharded(model):
                text = "it runs on a GPU, but its ray_actor_options name none, so Ray would count the GPU as free"
                fix = f"Add num_gpus: {each.num_gpus:g} there, or set engine: llamacpp."
                yield Finding(f"model {model.id}", False, text, fix)
            else:
                yield Finding(f"model {model.id}", True, f"{model.source}, asks for {_amount(each, 1)} GiB")


def explain(findings: list[Finding]) -> str:
    """The failed findings as text for a person."""
    return "\n".join(f"{finding.name}: {finding.text}. {finding.fix}" for finding in findings if not finding.is_ok)


def _actor_options(config: RayConfig, application: str, deployment: str) -> ActorOptions | None:
    override = config.override(application, deployment)
    return None if override is None else override.ray_actor_options


def _model(config: RayConfig, application: str) -> ModelConfig:
    return config.app.models[application.removeprefix("llm-")]


def _list(wanted: list[Demand], field: str) -> str:
    def amount(demand: Demand) -> str:
        if field == "num_cpus":
            return f"{demand.each.num_cpus * demand.replicas:g}"
        return _amount(demand.each, demand.replicas)

    return ", ".join(f"{d.application}/{d.deployment} {amount(d)}" for d in wanted)


def _amount(each: Resources, replicas: int) -> str:
    """GiB of memory, and of what it consists."""
    least = "at least " if each.is_lower_bound else ""
    of_each = "of each " if replicas > 1 else ""
    parts = f" ({of_each}{each.parts})" if each.parts else ""
    return f"{least}{replicas * each.memory / GIB:.1f}{parts}"


def _container_memory() -> tuple[int | None, int]:
    """Limit and use of this container (cgroup 2); no limit outside of one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        cached = [
            line for line in (folder / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")
        ]
    except OSError:
        return None, 0
    return (None if limit == "max" else int(limit)), used - sum(int(line.split()[1]) for line in cached)


def _free_port(host: str) -> int:
    with bind_socket(host, 0) as free:
        port: int = free.getsockname()[1]
    return port


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
