"""What Serve runs for one chat model: reads its slice of the configuration, makes the engine, and serves it."""

import asyncio
import os
from pathlib import Path

from ray import serve

from cluster.catalogue import resolve
from cluster.engine import Engine
from cluster.engines.choice import choose_engine, detect_hardware, make_engine
from cluster.engines.settings import EngineSettings
from cluster.errors import ClusterError
from cluster.home import open_home
from cluster.weights.prepare import prepare
from services.config import Environment, ModelConfig
from services.discovery import RayBeatStore
from services.environment import read_environment
from services.model_service import ModelService
from services.ray_adapter import close_replica_ports
from services.replica_log import log_into_replica_file


class ModelServer:
    """One replica: a `ModelService` with its life given by Serve."""

    async def __init__(self, config: ModelConfig) -> None:  # type: ignore[misc]
        """Serve awaits this; the replica counts as started when the model can answer."""
        close_replica_ports()
        log_into_replica_file()
        environment = read_environment()
        context = serve.get_replica_context()
        engine = await asyncio.to_thread(build_engine, config, environment)
        self._service = ModelService(
            engine,
            environment.internal_secret,
            app=context.app_name,
            replica_id=context.replica_id.unique_id,
            beats=RayBeatStore(),
            host=environment.internal_host,
        )
        await self._service.start()

    async def check_health(self) -> None:
        await self._service.check_health()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown."""
        if service := getattr(self, "_service", None):
            await service.stop()


def build_engine(config: ModelConfig, environment: Environment) -> Engine:
    """Prepare the model's files where that is needed, and make its engine. Blocks; may fetch from a hub."""
    resolved = resolve(config.source)
    choice = choose_engine(resolved, detect_hardware(), config.engine)
    if choice.model_format is None:
        assert resolved.url is not None, "a remote model has a URL"
        location: Path | str = resolved.url
    else:
        location = prepare(resolved, choice.model_format, open_home(environment.home))
    return make_engine(
        choice,
        EngineSettings(
            model=config.id,
            location=location,
            max_context=config.max_context,
            parallel_requests=config.parallel_requests,
            max_queued_requests=config.max_queued_requests,
            threads=config.threads or environment.threads,
            options=config.engine_options,
            remote_model=config.remote_model,
            remote_key=_remote_key(config),
        ),
    )


def _remote_key(config: ModelConfig) -> str | None:
    if config.remote_key_env is None:
        return None
    key = os.environ.get(config.remote_key_env)
    if not key:
        raise ClusterError(
            f"The model {config.id} takes its key from the environment variable {config.remote_key_env}, which is not "
            "set. Set it before `windfarm up`."
        )
    return key
