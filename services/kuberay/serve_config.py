"""The Serve config file of a windfarm on Kubernetes: the same sections as `ray_config.yaml`, with resources per pod."""

from __future__ import annotations

from typing import Any

from cluster.engines.expert_balancer import balancer_options
from services.kuberay.deployment import Deployment
from services.resources import EMBEDDING, GATEWAY, PAGE, STORE, Resources
from services.scaling_config import SCALING_POLICY

PUBLIC_PORT = 8000
PLATFORM_RESOURCE = "windfarm-platform"
"""Ray's name for the pod that holds the shared folder; what must see that folder asks for a little of it."""
QDRANT_KEY_VARIABLE = "WINDFARM_QDRANT_API_KEY"
FIRST_TOKEN_TARGET_S = 2.0
# A replica, and perhaps its node, takes minutes to come: it is wanted when this share of the slots is taken.
SLOT_USE = 0.75


def serve_config(deployment: Deployment) -> dict[str, Any]:
    """What KubeRay hands to Ray Serve (`serveConfigV2`)."""
    return {
        "proxy_location": "Disabled",
        "applications": [
            _application(f"llm-{deployment.model}", "build_model", _model(deployment), [_model_override(deployment)]),
            _application("embed", "build_embedding", {"source": "embed"}, [_pinned("Embedding", EMBEDDING)]),
            _application(
                "store", "build_store", {"qdrant": {"api_key_env": QDRANT_KEY_VARIABLE}}, [_pinned("Store", STORE)]
            ),
            _application(
                "platform",
                "build_platform",
                {"listen": {"host": "0.0.0.0", "port": PUBLIC_PORT}, "default_model": deployment.model},
                [_pinned("Gateway", GATEWAY), _pinned("Ui", PAGE)],
            ),
        ],
    }


def _application(name: str, builder: str, args: dict[str, Any], overrides: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": None,
        "import_path": f"services.app:{builder}",
        "args": args,
        "deployments": overrides,
    }


def _model(deployment: Deployment) -> dict[str, Any]:
    args: dict[str, Any] = {
        "id": deployment.model,
        "source": deployment.source,
        "engine": "vllm",
        "max_context": deployment.context,
        "parallel_requests": deployment.requests_per_replica,
    }
    if not deployment.uses_gpus:
        args["threads"] = deployment.replica_cpus
    if deployment.tensor > 1:
        args["tensor_parallel_size"] = deployment.tensor
    if deployment.data > 1:
        args["data_parallel_size"] = deployment.data
    if deployment.expert_ranks is not None:
        args |= {"expert_placement": "planned", "expert_ranks": [list(layer) for layer in deployment.expert_ranks]}
    if deployment.num_redundant_experts is not None:
        args["engine_options"] = balancer_options(deployment.num_redundant_experts)
    return args


def _model_override(deployment: Deployment) -> dict[str, Any]:
    """Serve scales each model by what it runs, holds and lets wait; Ray's autoscaler then brings the pods."""
    options: dict[str, Any] = {"num_cpus": deployment.replica_cpus, "memory": deployment.replica_memory}
    if deployment.uses_gpus:
        options["num_gpus"] = deployment.tensor
    return {
        "name": "ModelServer",
        "autoscaling_config": {
            "min_replicas": deployment.min_replicas,
            "max_replicas": deployment.max_replicas,
            "upscale_delay_s": 10,
            "downscale_delay_s": 900,
            "policy": {
                "policy_function": SCALING_POLICY,
                "policy_kwargs": {"first_token_target_s": FIRST_TOKEN_TARGET_S, "slot_use": SLOT_USE},
            },
        },
        "ray_actor_options": options,
    }


def _pinned(name: str, resources: Resources) -> dict[str, Any]:
    """One replica on the pod of the platform."""
    return {
        "name": name,
        "num_replicas": 1,
        "ray_actor_options": {
            "num_cpus": resources.num_cpus,
            "memory": resources.memory,
            "resources": {PLATFORM_RESOURCE: 0.001},
        },
    }
