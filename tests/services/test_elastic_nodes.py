"""Where nodes come with demand, an application is built from its section alone: no Ray is asked, no weights fetched."""

import pytest
import ray

from cluster.errors import PlanError
from cluster.home import Home, open_home
from services.config import ModelConfig
from services.environment import has_elastic_nodes
from services.sharding import options_on_cluster

MIXTRAL = ModelConfig(
    id="mixtral", source="hf:nobody/nothing", engine="vllm", data_parallel_size=4, tensor_parallel_size=2
)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("WINDFARM_ELASTIC_NODES", "1")
    return open_home(tmp_path_factory.mktemp("home"))


def test_a_gang_is_described_before_there_is_a_node_for_it(home: Home) -> None:
    assert not ray.is_initialized()
    options, section, expert_ranks = options_on_cluster(MIXTRAL, home)
    assert section == MIXTRAL
    assert not ray.is_initialized()
    assert expert_ranks is None  # placed linearly, by the engine
    assert options["gang_scheduling_config"].gang_size == 4
    assert options["num_replicas"] == 4
    assert options["ray_actor_options"]["num_cpus"] > 0
    assert not list(home.models.iterdir())


def test_a_tensor_parallel_group_alone_is_no_gang(home: Home) -> None:
    options, _, _ = options_on_cluster(MIXTRAL.model_copy(update={"data_parallel_size": 1}), home)
    assert "gang_scheduling_config" not in options
    assert options["num_replicas"] == 1


@pytest.mark.parametrize("change", [{"expert_placement": "planned"}, {"plan": "plan.json"}])
def test_a_plan_that_could_not_be_followed_is_refused(home: Home, change: dict[str, str]) -> None:
    with pytest.raises(PlanError, match=r"no such file is read.*--emit kuberay"):
        options_on_cluster(MIXTRAL.model_copy(update=change), home)


def test_experts_are_placed_as_the_section_says(home: Home) -> None:
    ranks = ((0, 7, 1, 6, 2, 5, 3, 4),) * 2
    planned = MIXTRAL.model_copy(update={"expert_placement": "planned", "expert_ranks": ranks})
    options, section, expert_ranks = options_on_cluster(planned, home)
    assert (section, expert_ranks) == (planned, ranks)
    assert options["num_replicas"] == 4


def test_nodes_are_fixed_unless_the_environment_says_otherwise() -> None:
    assert not has_elastic_nodes({})
    assert has_elastic_nodes({"WINDFARM_ELASTIC_NODES": "1"})
