"""Models that are cut into ranks: from their section of the configuration and the nodes at hand to a placement.

Asked twice: before anything starts, so that what cannot work is an error at once, and when Serve builds the
application, with the nodes of the running cluster.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.catalogue import resolve
from cluster.engines.choice import choose_engine, detect_hardware
from cluster.engines.expert_balancer import balancer_options, check_balanced, is_balanced, num_redundant_experts
from cluster.engines.memory import read_model_config
from cluster.engines.parallelism import ExpertRanks, Parallelism
from cluster.errors import PlanError
from cluster.expert_placement import plan
from cluster.home import Home
from cluster.known_shapes import find_shape
from cluster.placement import Placement, Reservation, check_plan, place, read_plan
from cluster.plan import GPU_MEMORY_SHARE, ExpertLoads, Plan, PlanRequest
from cluster.routing_trace import read_trace
from cluster.sizing import STEP_TOKENS, ModelShape, Workload
from cluster.topology import Topology, topology_from_ray
from cluster.weights.footprint import footprint_of
from cluster.weights.prepare import prepare
from cluster.weights.safetensors_header import fingerprint
from services.config import ModelConfig
from services.environment import has_elastic_nodes
from services.resources import GIB, RANK_CPUS, RANK_RUNTIME_BYTES, rank_cpus


def is_sharded(config: ModelConfig) -> bool:
    """Whether one copy of the model has more than one rank."""
    return config.num_ranks > 1


def num_gangs(config: ModelConfig, num_replicas: int | None) -> int:
    """Copies of the model that `num_replicas` of the file means; one where the file names no number."""
    if num_replicas is None:
        return 1
    size = config.data_parallel_size
    if num_replicas % size:
        raise PlanError(
            f"num_replicas of {config.id} is {num_replicas}, but a gang has {size} ranks and each is a replica. "
            f"Use a multiple of {size}."
        )
    return num_replicas // size


def request_on_ray(shape: ModelShape, work: Workload) -> PlanRequest:
    """What `windfarm up` and `windfarm plan` ask alike: with the cores and memory that a rank's processes reserve, and
    all memory of a node, since Ray's figure leaves out what the system and other programs hold."""
    return PlanRequest(shape, work, cores_per_rank=RANK_CPUS, runtime_bytes=RANK_RUNTIME_BYTES, node_memory_share=1.0)


def request_on_card(config: ModelConfig, home: Home) -> PlanRequest | None:
    """What one GPU must hold of a model that is not cut; none where it is not vLLM's or its size is not known."""
    resolved = resolve(config.source)
    choice = choose_engine(resolved, detect_hardware(), config.engine)
    if choice.engine != "vllm":
        return None
    files = footprint_of(resolved, "hf", home.root, ask_hub=False)
    if files.shape is None:
        return None
    shape = files.shape.in_dtype(config.engine_options.get("dtype"))
    asked = request_on_ray(shape, replace(_workload(config, shape), num_sequences=1))
    return replace(asked, tensor=1, pipeline=1, data=1, gpu_memory_share=gpu_memory_share(config))


def gpu_memory_share(config: ModelConfig) -> float:
    """The share of a GPU that vLLM is told to take. Raises `PlanError` for what is no share."""
    share = config.engine_options.get("gpu_memory_utilization", GPU_MEMORY_SHARE)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise PlanError(f"gpu_memory_utilization of {config.id} is {share!r}; it is a share above 0 and up to 1.")
    return float(share)


def plan_model(config: ModelConfig, topology: Topology, home: Home, gangs: int) -> tuple[Plan, Placement]:
    """Raises `PlanError` (`NoFit` where the nodes are too small) or another `ClusterError` of the model's files."""
    resolved = resolve(config.source)
    choice = choose_engine(resolved, detect_hardware(), config.engine)
    if choice.engine != "vllm":
        raise PlanError(
            f"{config.id} has {config.num_ranks} ranks, but only vLLM can cut a model into ranks, not {choice.engine}. "
            "Set engine: vllm, or use num_replicas."
        )
    shape = model_shape(config, home)
    copies = _num_copies(config)
    request = replace(
        request_on_ray(shape, _workload(config, shape)),
        replicas=max(1, gangs),
        tensor=config.tensor_parallel_size,
        pipeline=1,
        data=config.data_parallel_size,
        loads=_loads(config, shape, home) or (_even_loads(shape) if copies else None),
        redundant_experts=copies,
        gpu_memory_share=gpu_memory_share(config),
    )
    made = plan(topology, request)
    rank = made.replicas[0].ranks[0]
    tensor = config.tensor_parallel_size
    memory = RANK_RUNTIME_BYTES if rank.accelerator is not None else _rank_memory(config, rank.needs.total)
    reservation = Reservation(
        num_cpus=round(RANK_CPUS * tensor, 4),
        memory=memory * tensor,
        num_gpus=float(tensor) if rank.accelerator is not None else 0.0,
    )
    placement = place(made, reservation)
    if config.plan is not None:
        placement = _follow_plan(config, request, topology, placement)
    if rank.accelerator is not None and (config.expert_placement == "planned" or is_balanced(config.engine_options)):
        check_balanced(config.id, read_model_config(model_folder(config, home)).get("architectures") or ())
    if config.expert_placement == "linear":
        return made, replace(placement, expert_ranks=None)  # what engines do by themselves
    if config.expert_ranks is not None:
        _check_expert_ranks(config, shape, is_on_cpu=rank.accelerator is None)
        placement = replace(placement, expert_ranks=config.expert_ranks)
    if rank.accelerator is not None:
        balancer_options(copies, config.engine_options)  # refuses options that contradict the plan
        return made, replace(placement, expert_ranks=None)
    return made, placement


def options_on_cluster(config: ModelConfig, home: Home) -> tuple[dict[str, Any], ModelConfig, ExpertRanks | None]:
    """Options of the deployment, the section with what the plan adds to it, and who holds which experts: with the nodes
    of the Ray that this process is part of.

    Where nodes come with demand, nothing is asked of them and no file is prepared: what the operator planned beforehand
    stands in the file, with the resources of a rank in its `deployments:` override.
    """
    if has_elastic_nodes():
        return (
            _options_as_written(config),
            config,
            config.expert_ranks if config.expert_placement == "planned" else None,
        )
    import ray

    records = ray.nodes()
    _, placement = plan_model(config, topology_from_ray(records), home, gangs=1)
    ids = {record["NodeName"]: record["NodeID"] for record in records if record["Alive"]}
    return placement.deployment_options(ids), section_as_planned(config, placement), placement.expert_ranks


def section_as_planned(config: ModelConfig, placement: Placement) -> ModelConfig:
    """On GPUs a planned placement becomes vLLM's own balancer of experts, with room for the plan's copies."""
    if config.expert_placement == "linear" or not placement.rank.num_gpus:
        return config
    options = balancer_options(placement.num_redundant_experts, config.engine_options)
    return config.model_copy(update={"engine_options": options})


def _options_as_written(config: ModelConfig) -> dict[str, Any]:
    if (config.expert_placement != "linear" and config.expert_ranks is None) or config.plan is not None:
        raise PlanError(
            f"{config.id} wants its experts placed by a plan or trace, but where nodes come with demand "
            "(WINDFARM_ELASTIC_NODES=1) no such file is read. Write the section with `windfarm plan --load TRACE "
            "--emit kuberay`, or set expert_placement: linear and leave plan out."
        )
    tensor = config.tensor_parallel_size
    rank = Reservation(round(rank_cpus(config) * tensor, 4), RANK_RUNTIME_BYTES * tensor)
    return Placement(config.data_parallel_size, 1, "PACK", rank).deployment_options({})


def _follow_plan(config: ModelConfig, request: PlanRequest, topology: Topology, made: Placement) -> Placement:
    """The file's nodes; and its experts, unless there is a trace to plan them from."""
    assert config.plan is not None
    saved = read_plan(Path(config.plan))
    check_plan(saved, request, topology)
    experts = saved.expert_ranks if config.expert_trace is None else made.expert_ranks
    return replace(made, nodes=saved.nodes, strategy=saved.strategy, expert_ranks=experts)


def _check_expert_ranks(config: ModelConfig, shape: ModelShape, *, is_on_cpu: bool) -> None:
    """Refuse ranks of another model or of other sizes, as the engines would."""
    if not is_on_cpu:
        raise PlanError(
            f"expert_ranks of {config.id} are for CPU nodes. On GPUs vLLM's balancer places the experts: leave "
            "expert_ranks out, and give expert_trace or plan."
        )
    Parallelism(
        config.tensor_parallel_size,
        config.data_parallel_size,
        data_parallel_rpc_port=1,
        enable_expert_parallel=True,
        expert_placement=config.expert_ranks,
    ).check(
        num_layers=shape.num_layers,
        num_experts=shape.num_experts if shape.is_sparse else 0,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
    )


def model_shape(config: ModelConfig, home: Home) -> ModelShape:
    """From the checkpoint's own config.json, in the type that the engine loads it. Prepares the files where needed."""
    resolved = resolve(config.source)
    shape = replace(find_shape(str(model_folder(config, home))), name=resolved.name)
    return shape.in_dtype(config.engine_options.get("dtype"))


def model_folder(config: ModelConfig, home: Home) -> Path:
    """The checkpoint. Prepares the files where needed."""
    resolved = resolve(config.source)
    return resolved.path or prepare(resolved, "hf", home)


def _workload(config: ModelConfig, shape: ModelShape) -> Workload:
    """Half of all contexts at their full length, as the engine reserves them; each rank has slots of its own."""
    sequences = config.data_parallel_size * ((config.parallel_requests + 1) // 2)
    step = config.engine_options.get("max_num_batched_tokens") or STEP_TOKENS
    return Workload(config.max_context or shape.max_context, sequences, step)


def _num_copies(config: ModelConfig) -> int:
    """Copies of experts in each layer: those of the plan that is followed, else what engine_options tell vLLM."""
    if config.plan is not None and config.expert_placement == "planned":
        return read_plan(Path(config.plan)).num_redundant_experts
    return num_redundant_experts(config.engine_options)


def _even_loads(shape: ModelShape) -> ExpertLoads:
    """Enough to see whether the copies fit; where they go is decided by vLLM while it runs."""
    return ExpertLoads(shape.name, ((1,) * shape.num_experts,) * shape.num_layers)


def _loads(config: ModelConfig, shape: ModelShape, home: Home) -> ExpertLoads | None:
    """The load that experts are placed by. A trace of another model is refused."""
    has_places = config.plan is not None or config.expert_ranks is not None
    if config.expert_placement == "linear" or (config.expert_trace is None and has_places):
        return None
    if config.expert_trace is None:
        raise PlanError(
            f"expert_placement of {config.id} is planned, but neither expert_trace nor plan is given. Record a trace "
            "with `windfarm experts --save`, or use expert_placement: linear."
        )
    return read_trace(Path(config.expert_trace)).loads_for(shape, fingerprint(model_folder(config, home)))


def _rank_memory(config: ModelConfig, needed: int) -> int:
    if config.memory_gib is None:
        return needed
    given = int(config.memory_gib * GIB)
    if given < needed:
        raise PlanError(
            f"memory_gib of {config.id} is {config.memory_gib:g}, that is {needed - given} bytes short of the {needed} "
            "that one rank needs. Leave it out, or lower max_context or parallel_requests."
        )
    return given
