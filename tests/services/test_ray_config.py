"""`ray_config.yaml` is checked as a whole: every problem is named with line, place and the nearest valid key."""

import json
from pathlib import Path

import pytest
from ray.serve.config import AutoscalingConfig

from services.ray_config import RayConfig, load_ray_config, parse_ray_config
from services.scaling_config import SCALING_POLICY, Goals, ModelScaling, Policy
from services.setup_errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")


def parse(text: str) -> RayConfig:
    return parse_ray_config(text, Path("ray_config.yaml"))


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def edited(before: str, after: str) -> str:
    assert SHIPPED.count(before) >= 1, before
    return SHIPPED.replace(before, after, 1)


@pytest.mark.parametrize(
    ("before", "after", "place", "advice"),
    [
        ("proxy_location: Disabled", "aplications: []\nproxy_location: Disabled", "", "did you mean `applications`"),
        (
            "    route_prefix: null",
            "    routeprefix: null\n    route_prefix: null",
            "applications[0]",
            "`route_prefix`",
        ),
        ("        top_k:", "        topk: 3\n        top_k:", "applications[3].args.retrieval", "did you mean `top_k`"),
        ("num_replicas: 1 ", "num_replica: 1 ", "applications[0].deployments[0]", "did you mean `num_replicas`"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(before: str, after: str, place: str, advice: str) -> None:
    message = problems(edited(before, after))
    assert f", {place}: unknown key" in message if place else ": unknown key" in message
    assert advice in message


def test_a_problem_names_its_line() -> None:
    text = edited("port: 8000", "port: 99999")
    assert f"line {line_of(text, 'port: 99999')}, applications[3].args.listen.port" in problems(text)


def test_several_problems_are_reported_at_once() -> None:
    text = edited("max_batch: 32", "max_batch: many").replace("parallel_parsers: 1", "paralel_parsers: 1")
    message = problems(text)
    assert "2 problems" in message
    assert "max_batch" in message
    assert "did you mean `parallel_parsers`" in message


def test_a_key_that_stands_twice_is_refused() -> None:
    assert "stands twice" in problems(
        edited("proxy_location: Disabled", "proxy_location: Disabled\nproxy_location: Disabled")
    )


def test_a_model_id_that_stands_twice_is_refused() -> None:
    model = "  - {name: llm-tiny, route_prefix: null, import_path: 'services.app:build_model', args: {id: tiny}}\n"
    assert "stands 2 times" in problems(edited("applications:\n", "applications:\n" + model))


def test_an_application_has_the_name_that_its_model_gives() -> None:
    assert "must be named `llm-tiny`" in problems(edited("name: llm-tiny", "name: tiny"))


def test_an_unknown_builder_is_refused_with_the_nearest_one() -> None:
    message = problems(edited("services.app:build_store", "services.app:build_stores"))
    assert "did you mean `services.app:build_store`" in message


def test_an_unknown_deployment_is_refused_with_the_nearest_one() -> None:
    assert "did you mean `Gateway`" in problems(edited("name: Gateway", "name: Gatway"))


def test_the_owner_of_a_folder_has_one_replica() -> None:
    assert "exactly one replica" in problems(
        edited("num_replicas: 1             # always 1: it owns", "num_replicas: 2 # ")
    )


def test_a_missing_application_is_named() -> None:
    start = SHIPPED.index("  - name: store")
    end = SHIPPED.index("  # ---- Public endpoint")
    assert "application `store`" in problems(SHIPPED[:start] + SHIPPED[end:])


def test_the_default_model_must_be_configured() -> None:
    assert "configured are: tiny" in problems(edited("default_model: tiny", "default_model: huge"))


def test_a_reranker_beside_the_embedding_model_has_a_folder() -> None:
    wanted = edited("rerank: null ", "rerank: embed ")
    assert (
        "retrieval.rerank" in (said := problems(wanted)) and "name it as `reranker` in the section of `embed`" in said
    )
    assert parse(wanted.replace("reranker: null", "reranker: /models/cross")).app.embed.reranker == "/models/cross"


def test_the_proxy_of_serve_stays_off() -> None:
    assert "proxy_location" in problems(edited("proxy_location: Disabled", "proxy_location: EveryNode"))


def test_an_override_of_resources_names_cpu_and_memory() -> None:
    text = edited("      - name: Gateway\n", "      - name: Gateway\n        ray_actor_options: {num_cpus: 1}\n")
    assert "key `memory` is missing" in problems(text)


def test_broken_yaml_is_an_error_with_its_place() -> None:
    assert "line 2" in problems("proxy_location: Disabled\n  applications: [\n")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_without_keys_is_refused(text: str) -> None:
    assert "holds no configuration" in problems(text)


def test_a_missing_file_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load_ray_config(tmp_path / "nowhere.yaml")


def test_another_model_is_one_line() -> None:
    line = next(line for line in SHIPPED.splitlines() if "{name: llm-mistral" in line).replace("#   -", "  -", 1)
    config = parse(edited("  - name: llm-tiny", line.strip().join(["  ", "\n  - name: llm-tiny"])))
    assert sorted(config.app.models) == ["mistral", "tiny"]


def test_a_model_beside_the_file_is_found_from_every_folder(tmp_path: Path) -> None:
    text = edited("source: tiny ", "source: ./mine.gguf ")
    config = parse_ray_config(text, tmp_path / "ray_config.yaml")
    assert config.app.models["tiny"].source == str(tmp_path / "mine.gguf")
    assert config.serve["applications"][0]["args"]["source"] == str(tmp_path / "mine.gguf")


NUM_REPLICAS = next(
    line for line in SHIPPED.splitlines() if line.startswith("        num_replicas: 1             # copies")
)


def scaled(**fields: object) -> str:
    """The file with the model scaled: the block that stands there as a comment, with other values."""
    policy = {"policy_function": "services.scaling:ScaleByNeed"}
    scaling = {"min_replicas": 1, "max_replicas": 3, "policy": policy} | fields
    return edited(NUM_REPLICAS, f"        autoscaling_config: {json.dumps(scaling)}")


def test_a_model_may_be_scaled() -> None:
    override = parse(scaled(min_replicas=0)).override("llm-tiny", "ModelServer")
    assert override is not None
    assert override.first_replicas is None, "the first request starts it"
    override = parse(scaled(min_replicas=1, initial_replicas=2)).override("llm-tiny", "ModelServer")
    assert override is not None
    assert override.first_replicas == 2


def test_the_scaling_that_stands_in_the_file_as_a_comment_says_the_defaults() -> None:
    """Without the number signs it is valid, and its values are what holds where a line is left out."""
    lines = SHIPPED.splitlines()
    start = lines.index("        # autoscaling_config:")
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("        #"))
    block = [line.replace("        # ", "        ", 1) for line in lines[start:end]]
    assert all("#" in line or line.endswith(":") or "policy_function" in line for line in block)
    text = edited(NUM_REPLICAS, "\n".join(block))
    override = parse(text).override("llm-tiny", "ModelServer")
    assert override is not None
    assert override.autoscaling_config is not None
    written = override.autoscaling_config
    assert ModelScaling.model_validate(written) == ModelScaling(policy=Policy(policy_function=SCALING_POLICY))
    assert written["policy"]["policy_kwargs"].keys() == Goals.model_fields.keys()
    assert written.keys() == ModelScaling.model_fields.keys()
    rays = AutoscalingConfig.model_validate({"policy": written["policy"]})
    assert {name: value for name, value in written.items() if name != "policy"} == {
        name: getattr(rays, name) for name in written if name != "policy"
    }, "where a line is left out, Ray's own default holds"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_replica": 3}, "did you mean `max_replicas`"),
        ({"target_ongoing_requests": 2}, "unknown key `target_ongoing_requests`"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 4}, "it is below min_replicas (4)"),
        ({"initial_replicas": 4}, "it is not within 1 and 3"),
        ({"policy": {"policy_function": "services.scaling:Other"}}, "services.scaling:ScaleByNeed"),
        (
            {"policy": {"policy_function": "services.scaling:ScaleByNeed", "policy_kwargs": {"slot_us": 1}}},
            "did you mean `slot_use`",
        ),
        (
            {"policy": {"policy_function": "services.scaling:ScaleByNeed", "policy_kwargs": {"cache_use": 2}}},
            "less than or equal to 1",
        ),
    ],
)
def test_a_scaling_that_cannot_be_meant_is_refused(fields: dict[str, object], said: str) -> None:
    message = problems(scaled(**fields))
    assert said in message
    assert "applications[0].deployments[0].autoscaling_config" in message


def test_a_model_is_not_scaled_by_what_serve_counts() -> None:
    text = edited(NUM_REPLICAS, "        autoscaling_config: {min_replicas: 1, max_replicas: 3}")
    assert "write `policy: {policy_function: services.scaling:ScaleByNeed}`" in problems(text)


def test_a_number_of_replicas_is_fixed_or_scaled() -> None:
    text = scaled().replace("        autoscaling_config", "        num_replicas: 2  # too\n        autoscaling_config")
    assert "take one of them away" in problems(text)


def test_gangs_are_scaled_as_a_whole() -> None:
    text = scaled(min_replicas=2, max_replicas=5).replace("data_parallel_size: 1 ", "data_parallel_size: 2 ")
    text = text.replace("engine: auto ", "engine: vllm ", 1)
    assert "max_replicas: 5 is no multiple of 2" in problems(text)


def test_the_embedding_model_is_scaled_by_what_serve_counts() -> None:
    text = edited(
        "        num_replicas: 1             # copies of the model; each",
        "        autoscaling_config: {min_replicas: 1, max_replicas: 3, target_ongoing_requests: 8} #",
    )
    assert parse(text).override("embed", "Embedding") is not None
