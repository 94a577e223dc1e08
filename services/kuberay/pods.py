"""Pod templates: containers with their security context, probes, resources and volumes.

Explicit probes are needed, not only wished: KubeRay would ask Serve's proxy on every worker, and windfarm runs none.
The root file system is read-only; what is written goes to the data folder, `/tmp` or shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.home import HOME_ENV
from services.environment import INTERNAL_HOST_VARIABLE
from services.kuberay.names import COMPONENT, ENVIRONMENT, LABELS
from services.kuberay.serve_config import PUBLIC_PORT

HOME_FOLDER = "/windfarm"
USER_ID = 1000
AGENT_PORT, GCS_PORT, DASHBOARD_PORT, METRICS_PORT = 52365, 6379, 8265, 8080

CONTAINER_SECURITY: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_SECURITY: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
# Ray's agent answers for its raylet, on the head also for the state of the cluster; these paths need no token.
RAY_HEALTH: Mapping[str, Any] = {"path": "/api/healthz", "port": AGENT_PORT}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a container gets: the same as request and limit, so that no neighbour takes it."""

    cpus: str
    memory: str
    num_gpus: int = 0

    def as_kubernetes(self) -> dict[str, Any]:
        amounts: dict[str, Any] = {"cpu": self.cpus, "memory": self.memory}
        if self.num_gpus:
            amounts["nvidia.com/gpu"] = self.num_gpus
        return {"requests": amounts, "limits": dict(amounts)}


@dataclass(frozen=True, slots=True)
class Volume:
    """A claim at a path. Its content lies in a folder of the volume, whose root may hold the file system's own."""

    name: str
    claim: str
    path: str

    def mount(self) -> dict[str, Any]:
        return {"name": self.name, "mountPath": self.path, "subPath": self.name}

    def source(self) -> dict[str, Any]:
        return {"name": self.name, "persistentVolumeClaim": {"claimName": self.claim}}


@dataclass(frozen=True, slots=True)
class Pod:
    """One kind of pod. `secrets` become environment variables; optional ones may be missing."""

    component: str
    container: str
    image: str
    resources: Resources
    readiness: Mapping[str, Any] = field(default_factory=lambda: RAY_HEALTH)
    ports: Mapping[str, int] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    optional_secrets: Sequence[str] = ()
    volumes: Sequence[Volume] = ()
    zones: int = 0
    hides_gpus: bool = False
    needs_kubernetes: bool = False
    """Whether it calls the Kubernetes API: the head does, its autoscaler makes pods."""


def pod_template(pod: Pod) -> dict[str, Any]:
    """`template` of a head or worker group."""
    spec: dict[str, Any] = {
        "securityContext": dict(POD_SECURITY),
        "terminationGracePeriodSeconds": 60,
        "containers": [_container(pod)],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            *([] if _has_home(pod) else [{"name": "home", "emptyDir": {}}]),
            *(volume.source() for volume in pod.volumes),
        ],
    }
    if not pod.needs_kubernetes:
        spec["automountServiceAccountToken"] = False
    if pod.resources.num_gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if pod.zones > 1:
        spec["topologySpreadConstraints"] = [_spread_over_zones(pod.component)]
    return {"metadata": {"labels": LABELS | {COMPONENT: pod.component}}, "spec": spec}


def _container(pod: Pod) -> dict[str, Any]:
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    mounts += [] if _has_home(pod) else [{"name": "home", "mountPath": HOME_FOLDER}]
    ports = {"metrics": METRICS_PORT, **pod.ports}
    return {
        "name": pod.container,
        "image": pod.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": dict(CONTAINER_SECURITY),
        "resources": pod.resources.as_kubernetes(),
        "env": _variables(pod),
        "envFrom": [
            {"configMapRef": {"name": ENVIRONMENT}},
            *({"secretRef": {"name": name}} for name in pod.secrets),
            *({"secretRef": {"name": name, "optional": True}} for name in pod.optional_secrets),
        ],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "startupProbe": _probe(RAY_HEALTH, period_s=5, failures=60),
        "livenessProbe": _probe(RAY_HEALTH, period_s=10, failures=12),
        "readinessProbe": _probe(pod.readiness, period_s=5, failures=3),
        "volumeMounts": [*mounts, *(volume.mount() for volume in pod.volumes)],
    }


def _has_home(pod: Pod) -> bool:
    return any(volume.path == HOME_FOLDER for volume in pod.volumes)


def _variables(pod: Pod) -> list[dict[str, Any]]:
    """What differs from pod to pod. Threads are counted from the limit: the node has more cores than the pod."""
    limit = {"containerName": pod.container, "resource": "limits.cpu"}
    variables: list[dict[str, Any]] = [
        {"name": INTERNAL_HOST_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "WINDFARM_THREADS", "valueFrom": {"resourceFieldRef": limit}},
    ]
    if pod.hides_gpus:  # the image of the GPU profile would otherwise show all of the node's GPUs to every pod
        variables.append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"})
    return variables


def _probe(http: Mapping[str, Any], *, period_s: int, failures: int) -> dict[str, Any]:
    return {"httpGet": dict(http), "periodSeconds": period_s, "timeoutSeconds": 5, "failureThreshold": failures}


def _spread_over_zones(component: str) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": LABELS | {COMPONENT: component}},
    }


def fixed_variables() -> dict[str, str]:
    """What is the same in all pods, beside telemetry and Ray's settings."""
    return {
        HOME_ENV: HOME_FOLDER,
        "WINDFARM_HOST": "0.0.0.0",
        "WINDFARM_PORT": str(PUBLIC_PORT),
        "WINDFARM_ELASTIC_NODES": "1",
        # Caches of libraries, and what passes through the page: both would otherwise go to the read-only image.
        "HOME": "/tmp/home",
        "GRADIO_TEMP_DIR": "/tmp/page",
    }
