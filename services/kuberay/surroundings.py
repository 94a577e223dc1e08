"""What stands around the RayService: namespace, settings, claims, the clients' Service, network rules, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.kuberay.deployment import Deployment
from services.kuberay.names import (
    CLIENT_LABEL,
    COMPONENT,
    DATA_CLAIM,
    ENVIRONMENT,
    HEAD,
    LABELS,
    MODELS,
    MODELS_CLAIM,
    NAMESPACE,
    PLATFORM,
    SERVICE,
)
from services.kuberay.pods import DASHBOARD_PORT, METRICS_PORT, fixed_variables
from services.kuberay.serve_config import PUBLIC_PORT
from services.process_environment import NO_TELEMETRY
from services.ray_adapter import RAY_VARIABLES

Object = dict[str, Any]

DATA_SIZE, MODELS_SIZE = "50Gi", "200Gi"
POSTGRES_PORT, QDRANT_PORT, QDRANT_GRPC_PORT, HTTPS_PORT, KUBERNETES_PORT, DNS_PORT = 5432, 6333, 6334, 443, 6443, 53
OPERATOR: Mapping[str, str] = {"app.kubernetes.io/name": "kuberay-operator"}
MONITORING: Mapping[str, str] = {"kubernetes.io/metadata.name": "monitoring"}


def namespace() -> Object:
    """Kubernetes itself refuses pods here that run as root or ask for privileges."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": dict(LABELS) | levels},
    }


def environment() -> Object:
    """Settings that are no secret, the same for every pod."""
    settings = {**NO_TELEMETRY, **RAY_VARIABLES, **fixed_variables()}
    settings["WINDFARM_PUBLIC_URL"] = f"http://{SERVICE}.{NAMESPACE}.svc:{PUBLIC_PORT}"
    return _object("v1", "ConfigMap", ENVIRONMENT) | {"data": dict(sorted(settings.items()))}


def claims(deployment: Deployment) -> list[Object]:
    """The platform's folder belongs to one pod; the models' is shared by all pods of the model."""
    mode = "ReadWriteMany" if deployment.group.max_pods > 1 else "ReadWriteOnce"
    return [_claim(DATA_CLAIM, "ReadWriteOnce", DATA_SIZE), _claim(MODELS_CLAIM, mode, MODELS_SIZE)]


def _claim(name: str, mode: str, size: str) -> Object:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    return _object("v1", "PersistentVolumeClaim", name) | {"spec": spec}


def public_service() -> Object:
    """Reached inside the cluster only; what opens it further (an ingress with TLS) is the operator's choice."""
    port = {"name": "http", "port": PUBLIC_PORT, "targetPort": PUBLIC_PORT, "protocol": "TCP"}
    spec = {"type": "ClusterIP", "selector": _labels(PLATFORM), "ports": [port]}
    return _object("v1", "Service", SERVICE) | {"spec": spec}


def network_policies() -> list[Object]:
    """Closed, but for: each other; the operator to the head; clients to the endpoint; metrics; what pods must reach."""
    every, own = {"matchLabels": dict(LABELS)}, [{"podSelector": {"matchLabels": dict(LABELS)}}]
    operator = [{"namespaceSelector": {}, "podSelector": {"matchLabels": dict(OPERATOR)}}]
    clients = [{"namespaceSelector": {"matchLabels": {CLIENT_LABEL: "true"}}}]
    monitoring = [{"namespaceSelector": {"matchLabels": dict(MONITORING)}}]
    dns = {"ports": [_port(DNS_PORT, "UDP"), _port(DNS_PORT)]}
    outside = [_port(port) for port in (HTTPS_PORT, POSTGRES_PORT, QDRANT_PORT, QDRANT_GRPC_PORT)]
    return [
        _policy("windfarm-inside", every, ingress=[{"from": own}], egress=[{"to": own}, dns, {"ports": outside}]),
        _policy("windfarm-operator", _selector(HEAD), ingress=[{"from": operator, "ports": [_port(DASHBOARD_PORT)]}]),
        _policy("windfarm-autoscaler", _selector(HEAD), egress=[{"ports": [_port(KUBERNETES_PORT)]}]),
        _policy("windfarm-clients", _selector(PLATFORM), ingress=[{"from": clients, "ports": [_port(PUBLIC_PORT)]}]),
        _policy("windfarm-metrics", every, ingress=[{"from": monitoring, "ports": [_port(METRICS_PORT)]}]),
    ]


def _policy(name: str, pods: Mapping[str, Any], **rules: list[Object]) -> Object:
    spec = {"podSelector": pods, "policyTypes": [kind.capitalize() for kind in rules], **rules}
    return _object("networking.k8s.io/v1", "NetworkPolicy", name) | {"spec": spec}


def disruption_budgets(deployment: Deployment) -> list[Object]:
    """A node is drained only while enough pods stay. These pods have no owner that can be scaled: counts, no shares."""
    needed = {HEAD: 1, PLATFORM: 1, MODELS: deployment.group.min_pods}
    return [
        _object("policy/v1", "PodDisruptionBudget", f"windfarm-{component}")
        | {"spec": {"minAvailable": count, "selector": _selector(component)}}
        for component, count in needed.items()
    ]


def _object(api_version: str, kind: str, name: str) -> Object:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": dict(LABELS)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _labels(component: str) -> dict[str, str]:
    return LABELS | {COMPONENT: component}


def _selector(component: str) -> Object:
    return {"matchLabels": _labels(component)}


def _port(number: int, protocol: str = "TCP") -> Object:
    return {"port": number, "protocol": protocol}
