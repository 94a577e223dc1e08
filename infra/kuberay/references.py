"""What the schemas of single objects cannot see: names in one object that must exist in another of the same file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]

OPERATORS_SECRETS = ("windfarm-internal", "windfarm-stores", "windfarm-hub")
"""Made by whoever deploys, as the README says; never in a manifest."""
SELECTING = {"Service": ("selector",), "PodDisruptionBudget": ("selector", "matchLabels")}


def lost_references(documents: Sequence[Document]) -> Iterator[str]:
    """A sentence for every reference that leads nowhere."""
    names = {(item["kind"], item["metadata"]["name"]) for item in documents if "metadata" in item}
    pods = [pod for item in documents if item.get("kind") == "RayService" for pod in pod_templates(item)]
    for pod in pods:
        yield from _lost_in_pod(pod, names)
    for item in documents:
        yield from _lost_selectors(item, pods)


def pod_templates(ray_service: Document) -> list[Document]:
    """The templates of head and workers."""
    cluster = ray_service.get("spec", {}).get("rayClusterConfig", {})
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", ())]
    return [group["template"] for group in groups if "template" in group]


def _lost_in_pod(pod: Document, names: set[tuple[str, str]]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and ("PersistentVolumeClaim", claim) not in names:
            yield f"volume {volume['name']}: there is no claim {claim}"
    for container in pod["spec"].get("containers", ()):
        place = f"container {container['name']}"
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{place}: there is no volume {mount['name']}"
        for source in container.get("envFrom", ()):
            config = source.get("configMapRef", {}).get("name")
            secret = source.get("secretRef", {}).get("name")
            if config is not None and ("ConfigMap", config) not in names:
                yield f"{place}: there is no ConfigMap {config}"
            if secret is not None and secret not in OPERATORS_SECRETS:
                yield f"{place}: nobody is told to make the secret {secret}"


def _lost_selectors(item: Document, pods: Sequence[Document]) -> Iterator[str]:
    """A selector that chooses no pod protects and serves nothing, without any error."""
    spec = item.get("spec", {})
    wanted: Any = None
    if item.get("kind") in SELECTING:
        wanted = spec
        for key in SELECTING[item["kind"]]:
            wanted = wanted.get(key, {})
    elif item.get("kind") == "NetworkPolicy":
        wanted = spec.get("podSelector", {}).get("matchLabels", {})
    if wanted is None:
        return
    if not any(wanted.items() <= pod["metadata"].get("labels", {}).items() for pod in pods):
        yield f"{item['kind']} {item['metadata']['name']} chooses no pod"
