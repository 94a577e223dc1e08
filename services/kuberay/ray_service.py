"""The RayService: head, platform pod and the pods of the model, with Ray's autoscaler, its token and its kept state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.topology import ACCELERATOR_LABEL, ACCELERATOR_MEMORY_LABEL
from services.kuberay.deployment import Deployment
from services.kuberay.names import (
    DATA_CLAIM,
    HEAD,
    HUB_SECRET,
    INTERNAL_SECRET,
    LABELS,
    MODELS,
    MODELS_CLAIM,
    NAMESPACE,
    PLATFORM,
    SERVICE,
    STORES_SECRET,
)
from services.kuberay.pods import (
    CONTAINER_SECURITY,
    DASHBOARD_PORT,
    GCS_PORT,
    HOME_FOLDER,
    Pod,
    Resources,
    Volume,
    pod_template,
)
from services.kuberay.serve_config import PLATFORM_RESOURCE, PUBLIC_PORT, serve_config
from services.preflight import OBJECT_STORE_BYTES
from services.ray_adapter import SUPPORTED_RAY

IMAGE_CPU, IMAGE_CUDA = "windfarm:cpu", "windfarm:cuda"
HEAD_STATE_SIZE = "8Gi"
AUTOSCALER = Resources("500m", "512Mi")


def ray_service(deployment: Deployment) -> dict[str, Any]:
    """The whole object. A changed `serveConfigV2` is applied in place; a changed cluster is not rolled out by itself:

    two clusters at once would be two owners of one database.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": SERVICE, "namespace": NAMESPACE, "labels": dict(LABELS)},
        "spec": {
            "upgradeStrategy": {"type": "None"},
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.dump(serve_config(deployment), Dumper=_Dumper, sort_keys=False, width=120),
            "rayClusterConfig": _cluster(deployment),
        },
    }


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line each: a layer's experts."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    is_row = bool(items) and all(isinstance(item, int) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_row)


_Dumper.add_representer(list, _represent_list)


def _cluster(deployment: Deployment) -> dict[str, Any]:
    return {
        "rayVersion": SUPPORTED_RAY,
        "authOptions": {"mode": "token"},
        "gcsFaultToleranceOptions": {"backend": "rocksdb", "storage": {"size": HEAD_STATE_SIZE}},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
            "imagePullPolicy": "IfNotPresent",
            "resources": AUTOSCALER.as_kubernetes(),
            "securityContext": dict(CONTAINER_SECURITY),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        },
        "headGroupSpec": _head(deployment),
        "workerGroupSpecs": [_platform(deployment), _models(deployment)],
    }


def _head(deployment: Deployment) -> dict[str, Any]:
    """Nothing of ours runs on it, so that it stays small and its loss costs little. Its service is inside only."""
    pod = Pod(
        component=HEAD,
        container="ray-head",
        image=_image(deployment),
        resources=Resources("1", "4Gi"),
        ports={"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "serve": PUBLIC_PORT},
        hides_gpus=deployment.uses_gpus,
        needs_kubernetes=True,
    )
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", **_object_store()},
        "template": pod_template(pod),
    }


def _platform(deployment: Deployment) -> dict[str, Any]:
    """Exactly one pod: endpoint, page, documents and embedding share its folder."""
    pod = Pod(
        component=PLATFORM,
        container="ray-worker",
        image=_image(deployment),
        resources=Resources("2", "8Gi"),
        readiness={"path": "/health", "port": PUBLIC_PORT},
        ports={"serve": PUBLIC_PORT},
        secrets=(INTERNAL_SECRET, STORES_SECRET),
        volumes=(Volume("data", DATA_CLAIM, HOME_FOLDER),),
        hides_gpus=deployment.uses_gpus,
    )
    return {
        "groupName": PLATFORM,
        "replicas": 1,
        "minReplicas": 1,
        "maxReplicas": 1,
        "rayStartParams": {"resources": _quoted({PLATFORM_RESOURCE: 1}), **_object_store()},
        "template": pod_template(pod),
    }


def _models(deployment: Deployment) -> dict[str, Any]:
    group = deployment.group
    pod = Pod(
        component=MODELS,
        container="ray-worker",
        image=_image(deployment),
        resources=Resources(str(group.cores), f"{group.memory_gib}Gi", group.num_gpus),
        secrets=(INTERNAL_SECRET,),
        optional_secrets=(HUB_SECRET,),
        volumes=(Volume("models", MODELS_CLAIM, f"{HOME_FOLDER}/models"),),
        zones=group.num_zones,
    )
    spec: dict[str, Any] = {
        "groupName": MODELS,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
        "rayStartParams": _object_store(),
        "template": pod_template(pod),
    }
    if group.num_gpus:
        spec["labels"] = {
            ACCELERATOR_LABEL: group.accelerator,
            ACCELERATOR_MEMORY_LABEL: str(group.accelerator_gb),
        }
    return spec


def _image(deployment: Deployment) -> str:
    """One image in all pods: Ray refuses to join nodes whose versions differ."""
    return IMAGE_CUDA if deployment.uses_gpus else IMAGE_CPU


def _object_store() -> dict[str, str]:
    """Text goes over HTTP, so little passes through Ray's object store; by default it takes a third of the memory."""
    return {"object-store-memory": str(OBJECT_STORE_BYTES)}


def _quoted(resources: Mapping[str, float]) -> str:
    """JSON in the quotes that the shell of `ray start` takes off again."""
    return f"'{json.dumps(resources)}'"
