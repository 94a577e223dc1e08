"""What Serve runs for one chat model: reads its slice of the configuration, makes the engine, and serves it."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from ray import serve

from cluster.catalogue import resolve
from cluster.engine import Engine
from cluster.engines.choice import choose_engine, detect_hardware, make_engine
from cluster.engines.parallelism import ExpertRanks, Parallelism
from cluster.engines.settings import EngineSettings
from cluster.engines.vllm_experts import num_experts
from cluster.errors import ClusterError
from cluster.home import open_home
from cluster.weights.checkpoint_check import read_json
from cluster.weights.prepare import prepare
from services.beats import RayBeatStore
from services.config import Environment, ModelConfig
from services.environment import read_environment
from services.gang import GangSeat, Meeting
from services.gang_member import GangMember
from services.model_service import ModelService
from services.ray_adapter import close_replica_ports
from services.replica_log import log_into_replica_file
from services.sharding import is_sharded, model_folder, model_shape


class ModelServer:
    """One replica: a `ModelService` with its life given by Serve. In a gang it is one rank of the model."""

    async def __init__(self, config: ModelConfig, expert_ranks: ExpertRanks | None = None) -> None:  # type: ignore[misc]
        """Serve awaits this; the replica counts as started when the model can answer."""
        close_replica_ports()
        log_into_replica_file()
        environment = read_environment()
        context = serve.get_replica_context()
        store = RayBeatStore()
        gang = context.gang_context
        seat = GangSeat(gang.gang_id, gang.rank, gang.world_size) if gang is not None else None
        self._member = (
            GangMember(context.app_name, seat, store, environment.internal_secret) if seat is not None else None
        )
        meeting = await self._member.join(environment.internal_host) if self._member is not None else None
        parallelism = await asyncio.to_thread(parallelism_of, config, environment, expert_ranks, seat, meeting)
        engine = await asyncio.to_thread(build_engine, config, environment, parallelism, meeting)
        self._service = ModelService(
            engine,
            environment.internal_secret,
            app=context.app_name,
            replica_id=context.replica_id.unique_id,
            beats=store,
            host=environment.internal_host,
            seat=seat,
        )
        await self._service.start()
        if self._member is not None:
            await self._member.watch(self._service)

    async def check_health(self) -> None:
        await self._service.check_health()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown."""
        if member := getattr(self, "_member", None):
            member.stop()
        if service := getattr(self, "_service", None):
            await service.stop()


def build_engine(
    config: ModelConfig,
    environment: Environment,
    parallelism: Parallelism | None = None,
    meeting: Meeting | None = None,
) -> Engine:
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
            threads=config.threads or environment.threads or _share_of_cores(config, environment, meeting),
            options=(_executor(config) if choice.engine == "vllm" else {}) | config.engine_options,
            remote_model=config.remote_model,
            remote_key=_remote_key(config),
            parallelism=parallelism or Parallelism(),
        ),
    )


def parallelism_of(
    config: ModelConfig,
    environment: Environment,
    expert_ranks: ExpertRanks | None,
    seat: GangSeat | None,
    meeting: Meeting | None,
) -> Parallelism:
    """How the engine of this replica is cut, and which part of it this is."""
    sizes = Parallelism(tensor_parallel_size=config.tensor_parallel_size)
    if not is_sharded(config):
        return replace(sizes, count_experts=_has_experts(config, environment))
    shape = model_shape(config, open_home(environment.home))
    sizes = replace(
        sizes,
        enable_expert_parallel=config.expert_parallel and shape.is_sparse,
        expert_placement=expert_ranks if config.expert_parallel else None,
        count_experts=shape.is_sparse,
    )
    if seat is None or meeting is None:
        return sizes
    return replace(
        sizes,
        data_parallel_size=seat.size,
        data_parallel_rank=seat.rank,
        data_parallel_address=meeting.address,
        data_parallel_rpc_port=meeting.port,
    )


def _has_experts(config: ModelConfig, environment: Environment) -> bool:
    """Whether this is a mixture that runs whole in vLLM here, whose experts can then be counted."""
    if choose_engine(resolve(config.source), detect_hardware(), config.engine).engine != "vllm":
        return False
    return num_experts(read_json(model_folder(config, open_home(environment.home)) / "config.json")) > 1


def _executor(config: ModelConfig) -> dict[str, str]:
    """Inside a placement group vLLM would take Ray to start its workers; here they are children of the replica. (On
    CPUs vLLM makes a process of the worker in both cases.)"""
    return {"distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni"}


def _share_of_cores(config: ModelConfig, environment: Environment, meeting: Meeting | None) -> int | None:
    """Threads of one rank: ranks on one node share its cores."""
    if not is_sharded(config):
        return None
    here = meeting.num_ranks_on(environment.internal_host) if meeting is not None else 1
    return max(1, (os.cpu_count() or 1) // (here * config.tensor_parallel_size))


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
