"""The CPU parts are on only where they belong: in workers, on CPU, on a version of vLLM that they know."""

import multiprocessing
from types import SimpleNamespace

import pytest

from cluster.engines.parallelism import Parallelism
from cluster.engines.vllm_experts import check_held_experts, check_parts, expert_options
from cluster.errors import ClusterError

pytestmark = pytest.mark.requires("vllm")

SPREAD = Parallelism(tensor_parallel_size=2, enable_expert_parallel=True)


def test_the_installed_version_is_known() -> None:
    from cluster.vllm_plugin.versions import check_version

    check_version("Expert parallelism")


def test_an_unknown_version_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.30.1+cpu")
    with pytest.raises(ClusterError, match=r"needs vLLM 0\.29\.0, but 0\.30\.1 is installed.*make setup"):
        expert_options(SPREAD, is_cpu=True)
    assert expert_options(Parallelism(), is_cpu=True) == {}  # one rank needs no part of ours


def test_parts_stay_off_outside_workers_and_on_unknown_versions(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    import cluster.vllm_plugin as plugin

    monkeypatch.setattr(plugin, "parts", ())
    monkeypatch.delenv(plugin.end_with_parent.PARENT_VARIABLE, raising=False)
    plugin.register()
    assert plugin.parts == ()
    monkeypatch.setattr(multiprocessing.current_process(), "_name", "VllmWorker-0")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr("vllm.version.__version__", "0.30.1")
    plugin.register()
    assert plugin.parts == ()


WORKERS_PARTS = (
    "cpu_linear",
    "cpu_collectives",
    "cpu_experts",
    "bf16_experts",
    "placed_experts",
    "expert_counters",
    "governed_spinning",
)


@pytest.mark.parametrize(
    ("process", "is_cpu", "expected"),
    [
        ("VllmWorker-0", True, ("patient_queues", *WORKERS_PARTS)),
        ("VllmWorker-0", False, ()),
        ("EngineCore_DP0", True, ("continued_grammars", "patient_queues", "forked_workers")),
        ("EngineCore_DP0", False, ("continued_grammars",)),
        ("MainProcess", False, ()),
    ],
)
def test_cpu_parts_are_on_only_where_the_platform_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, process: str, is_cpu: bool, expected: tuple[str, ...]
) -> None:
    import cluster.vllm_plugin as plugin

    installed: list[str] = []

    def load(name: str) -> SimpleNamespace:
        return SimpleNamespace(install=lambda: installed.append(name.removeprefix("cluster.vllm_plugin.")))

    monkeypatch.setattr(plugin, "importlib", SimpleNamespace(import_module=load))
    monkeypatch.setattr(plugin, "parts", ())
    monkeypatch.delenv(plugin.end_with_parent.PARENT_VARIABLE, raising=False)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(multiprocessing.current_process(), "_name", process)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))
    plugin.register()
    assert plugin.parts == tuple(installed) == expected


async def test_a_worker_without_the_parts_is_an_error() -> None:
    async def collective_rpc(method: str) -> list[list[str]]:
        return [["end_with_parent"]]

    with pytest.raises(ClusterError, match="cpu_experts, expert_counters, placed_experts missing"):
        await check_parts(SimpleNamespace(collective_rpc=collective_rpc))


HELD = [[[0, 2], [1, 3]], [[1, 3], [0, 2]]]
"""By rank and layer, of the placement below."""


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (HELD, None),
        (HELD[::-1], r"Rank 2 holds the experts \[1, 3\] of layer 0, but \[0, 2\] were placed there"),
        ([HELD[0], [[1, 3], [0, 1]]], r"Rank 3 holds the experts \[0, 1\] of layer 1, but \[0, 2\] were placed there"),
        ([rank[:1] for rank in HELD], "Rank 2 has 1 layers with experts, but they were placed for 2"),
    ],
)
async def test_workers_that_hold_other_experts_than_they_were_told_are_an_error(
    held: list[list[list[int]]], message: str | None
) -> None:
    """The second engine of a gang, with two ranks of four."""

    async def collective_rpc(method: str) -> list[list[list[int]]]:
        assert method == "windfarm_held_experts"
        return held

    parallelism = Parallelism(
        tensor_parallel_size=2,
        data_parallel_size=2,
        data_parallel_rank=1,
        data_parallel_rpc_port=1,
        enable_expert_parallel=True,
        expert_placement=((2, 3, 2, 3, 0, 0, 1, 1), (3, 2, 3, 2, 0, 0, 1, 1)),
    )
    config = {"num_hidden_layers": 2, "num_local_experts": 8}
    checked = check_held_experts(SimpleNamespace(collective_rpc=collective_rpc), parallelism, config)
    if message is None:
        await checked
        return
    with pytest.raises(ClusterError, match=message):
        await checked


def test_single_experts_are_not_placed_on_gpus() -> None:
    placed = Parallelism(
        tensor_parallel_size=2, enable_expert_parallel=True, expert_placement=((0, 1),), count_experts=True
    )
    with pytest.raises(ClusterError, match="enable_eplb"):
        expert_options(placed, is_cpu=False)
    assert expert_options(Parallelism(count_experts=True), is_cpu=False) == {"enable_return_routed_experts": True}
