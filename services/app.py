"""The composition root: which deployments there are, what each gets, and what each asks Ray for.

Each function builds one Serve application from its own slice of `ray_config.yaml`, so that a changed slice restarts
that application alone. Parts of one application never call each other's objects: they meet through Serve handles
(store, embedding), through announced listeners (models, page) or through the database.
"""

# Annotations stay real objects here: Ray does not validate the arguments of a builder whose annotation is a string.
# Imports of deployments, and of what only one kind needs, stay inside the functions: building the store must not load
# the libraries of the models.

import logging
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.home import open_home
from services.config import EmbeddingConfig, ModelConfig, PlatformConfig, StoreConfig
from services.environment import data_folder
from services.resources import BALANCER, EMBEDDING, GATEWAY, GIB, PAGE, STORE, Resources, model_resources

_log = logging.getLogger(__name__)

STOP_S = 5.0


def build_store(config: StoreConfig) -> Application:
    """Database and vector store: one replica owns the folder."""
    from services.store import Store

    return _deployment(Store, STORE, max_ongoing_requests=128).bind(config)


def build_embedding(config: EmbeddingConfig) -> Application:
    """The embedding model; requests are batched inside the replica."""
    from services.embedding import Embedding

    return _deployment(Embedding, EMBEDDING, max_ongoing_requests=256).bind(config)


def build_model(config: ModelConfig) -> Application:
    """One chat model: its replicas announce their own listeners. Where it is cut into ranks, each is a replica."""
    from services.model_server import ModelServer
    from services.model_service import DRAIN_S
    from services.sharding import is_sharded, options_on_cluster

    # A replica that is replaced lets its streams end; `windfarm down` does not wait for that.
    deployment = _deployment(ModelServer, _model_resources(config), stop_s=DRAIN_S + STOP_S)
    if not is_sharded(config):
        return deployment.bind(config)
    options, section, expert_ranks = options_on_cluster(config, open_home(data_folder()))
    return deployment.options(**options).bind(section, expert_ranks)


def build_platform(config: PlatformConfig) -> Application:
    """The public endpoint with chat and retrieval, the page behind it, and a balancer before it where wanted."""
    from services.gateway import Gateway
    from services.page import Ui

    beside = [_deployment(Ui, PAGE).bind(config)]
    if config.listen.balancer == "haproxy":
        from services.balancer import Balancer

        beside.append(_deployment(Balancer, BALANCER).bind(config))
    return _deployment(Gateway, GATEWAY, stop_s=config.streams.relay_drain_s + STOP_S).bind(config, *beside)


def _model_resources(config: ModelConfig) -> Resources:
    resources = model_resources(config, data_folder())
    if resources.is_lower_bound:
        _log.warning(
            "The files of %s are not on this machine yet, so its replicas ask Ray for %.1f GiB (%s) unless "
            "`deployments:` names their memory. Fetch the model first (`windfarm up` does) or set memory_gib.",
            config.id,
            resources.memory / GIB,
            resources.parts,
        )
    return resources


def _deployment(
    target: type, resources: Resources, *, max_ongoing_requests: int = 64, stop_s: float = STOP_S
) -> serve.Deployment:
    """What all deployments have in common. A stopping replica gets `stop_s` seconds to finish what it does."""
    options: dict[str, Any] = {
        "name": target.__name__,
        "ray_actor_options": resources.actor_options(),
        "max_ongoing_requests": max_ongoing_requests,
        "graceful_shutdown_timeout_s": stop_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 3.0,
        "health_check_timeout_s": 15.0,
    }
    return serve.deployment(**options)(target)
