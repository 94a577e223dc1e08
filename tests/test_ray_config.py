"""The traps of Ray Serve's configuration, and that the file which comes along says every default."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from services import app, ray_config
from services.config import AppConfig, EmbeddingConfig, ModelConfig, PlatformConfig, Section, StoreConfig
from services.ray_config import BUILDERS, load_ray_config
from services.scaling_config import ModelScaling

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "ray_config.yaml"


@pytest.mark.parametrize("import_path", BUILDERS)
def test_ray_validates_the_arguments_of_every_builder(import_path: str) -> None:
    """With `from __future__ import annotations` the annotation would be a string, and Ray would pass a plain dict."""
    builder = getattr(app, import_path.partition(":")[2])
    (parameter,) = inspect.signature(builder).parameters.values()
    assert parameter.annotation is BUILDERS[import_path].config


@pytest.mark.parametrize(
    ("ours", "rays"),
    [
        (ray_config.ServeFile, ServeDeploySchema),
        (ray_config.ApplicationEntry, ServeApplicationSchema),
        (ray_config.DeploymentOverride, DeploymentSchema),
        (ray_config.ActorOptions, RayActorOptionsSchema),
        (ModelScaling, AutoscalingConfig),
    ],
)
def test_every_key_that_we_allow_is_one_of_rays(ours: type[Section], rays: Any) -> None:
    assert set(ours.model_fields) <= set(rays.model_fields)


def test_ray_takes_the_file() -> None:
    ServeDeploySchema.model_validate(load_ray_config(FILE).serve)


def test_ray_itself_ignores_an_unknown_key_at_the_top() -> None:
    """The reason for our own check; when this fails, Ray has learned it and ours may go."""
    ServeDeploySchema.model_validate({**load_ray_config(FILE).serve, "aplications": []})


def test_the_file_says_the_defaults_and_nothing_else() -> None:
    config = load_ray_config(FILE).app
    assert config == AppConfig(
        store=StoreConfig(),
        embed=EmbeddingConfig(),
        models={"tiny": ModelConfig(id="tiny")},
        platform=PlatformConfig(),
    )


@pytest.mark.parametrize("application", yaml.safe_load(FILE.read_text(encoding="utf-8"))["applications"])
def test_every_default_is_written_in_the_file(application: dict[str, Any]) -> None:
    config = BUILDERS[application["import_path"]].config
    assert missing_keys(config, application["args"]) == []


def missing_keys(config: type[Section], written: dict[str, Any], prefix: str = "") -> list[str]:
    missing = []
    for name, field in config.model_fields.items():
        if name not in written:
            missing.append(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            missing += missing_keys(field.annotation, written[name], f"{prefix}{name}.")
    return missing


def test_every_value_of_the_file_has_a_comment() -> None:
    bare = [
        line
        for line in FILE.read_text(encoding="utf-8").splitlines()
        if ": " in line
        and not line.lstrip().startswith(("#", "- name", "route_prefix", "import_path"))
        and "#" not in line
    ]
    assert bare == []


def test_a_change_of_one_model_leaves_the_arguments_of_all_others() -> None:
    """Ray restarts an application when its `args` change: nothing may be shared between the slices."""
    text = FILE.read_text(encoding="utf-8")
    before = load_ray_config(FILE).serve["applications"]
    after = ray_config.parse_ray_config(text.replace("parallel_requests: 4", "parallel_requests: 2"), FILE).serve[
        "applications"
    ]
    changed = [new["name"] for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["llm-tiny"]


def test_nothing_of_the_default_file_demands_more_than_two_cores(tmp_path: Path) -> None:
    from services.preflight import demands

    wanted = demands(load_ray_config(FILE), tmp_path)
    assert sum(demand.replicas * demand.each.num_cpus for demand in wanted) <= 1.5
    assert all(demand.each.memory > 0 for demand in wanted)
