"""The composition: what each replica asks Ray for."""

from pathlib import Path
from typing import Any

import pytest
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve import Application

from services import app
from services.config import ModelConfig, PlatformConfig, StoreConfig, StreamsConfig
from services.model_service import DRAIN_S
from services.ray_config import BUILDERS, load_ray_config

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"


def deployments(application: Application) -> list[Any]:
    """The deployments of an application, those that are bound to others included."""
    first = application._bound_deployment
    return [first, *(found for each in first.init_args if isinstance(each, Application) for found in deployments(each))]


@pytest.mark.parametrize("entry", load_ray_config(FILE).serve["applications"], ids=lambda entry: entry["name"])
def test_every_replica_asks_ray_for_its_cpus_and_its_memory(entry: dict[str, Any]) -> None:
    builder = BUILDERS[entry["import_path"]]
    built = getattr(app, entry["import_path"].partition(":")[2])(builder.config.model_validate(entry["args"]))
    found = deployments(built)
    assert {deployment.name for deployment in found} == {each["name"] for each in entry["deployments"]}
    for deployment in found:
        asked = deployment.ray_actor_options
        assert asked["num_cpus"] > 0, deployment.name
        assert asked["memory"] > 100 * 2**20, deployment.name


def test_the_store_stays_on_the_machine_that_has_its_folder() -> None:
    (store,) = deployments(app.build_store(StoreConfig()))
    assert store.ray_actor_options["resources"] == {HEAD_NODE_RESOURCE_NAME: 0.001}


def test_a_model_that_is_replaced_gets_the_time_in_which_its_streams_may_end() -> None:
    (model,) = deployments(app.build_model(ModelConfig(id="tiny", source="tiny")))
    assert model._deployment_config.graceful_shutdown_timeout_s > DRAIN_S


def test_an_endpoint_that_is_replaced_gets_the_time_that_the_configuration_gives_its_streams() -> None:
    config = PlatformConfig(streams=StreamsConfig(relay_drain_s=900))
    endpoint = next(each for each in deployments(app.build_platform(config)) if each.name == "Gateway")
    assert endpoint._deployment_config.graceful_shutdown_timeout_s > 900
