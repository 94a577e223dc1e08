"""The manifests are what the command writes, hold to every schema, and a wrong field anywhere is caught."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from infra.kuberay.check import FOLDER, check_document, check_file, main, read_documents
from infra.kuberay.references import OPERATORS_SECRETS, lost_references, pod_templates
from infra.kuberay.write import command_of, written_again
from services.cli.commands import app
from services.process_environment import NO_TELEMETRY
from services.ray_adapter import RAY_VARIABLES, SUPPORTED_RAY

PROFILES = ("cpu-experts-4", "mixtral-2x4x40gb", "one-gpu")
MIXTRAL = FOLDER / "mixtral-2x4x40gb.yaml"
Document = dict[str, Any]


def documents(profile: str) -> list[Document]:
    return read_documents((FOLDER / f"{profile}.yaml").read_text(encoding="utf-8"))


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [item for item in found if item["kind"] == kind]


def ray_service(profile: str) -> Document:
    (found,) = of_kind(documents(profile), "RayService")
    return found


def cluster(profile: str) -> Document:
    return dict(ray_service(profile)["spec"]["rayClusterConfig"])


def serve(profile: str) -> Document:
    return dict(yaml.safe_load(ray_service(profile)["spec"]["serveConfigV2"]))


def model_of(profile: str) -> tuple[Document, Document]:
    """Arguments of the model's application, and the override of its deployment."""
    application = next(item for item in serve(profile)["applications"] if item["name"].startswith("llm-"))
    (override,) = application["deployments"]
    return application["args"], override


def containers(profile: str) -> list[Document]:
    return [container for pod in pod_templates(ray_service(profile)) for container in pod["spec"]["containers"]]


def group(profile: str, name: str) -> Document:
    return next(item for item in cluster(profile)["workerGroupSpecs"] if item["groupName"] == name)


# What the command writes


def test_there_is_a_manifest_for_each_profile() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == list(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_manifest_is_what_its_command_writes(profile: str) -> None:
    path = FOLDER / f"{profile}.yaml"
    assert f"infra/nodes/{profile}.yaml" in command_of(path)
    assert written_again(path) == path.read_text(encoding="utf-8"), "`make manifests` writes them again"


def test_all_checks_pass_and_the_last_line_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    num_passed = sum(line.startswith("passed") for line in lines)
    assert num_passed == len(lines) - 1 > 40
    assert lines[-1] == f"{num_passed} passed, 0 failed"


# Wrong fields

Plant = Callable[[list[Document]], None]


def edit(kind: str, /, *path: str | int, **fields: Any) -> Plant:
    """Set fields in the first object of a kind, at a place inside of it."""

    def plant(found: list[Document]) -> None:
        place: Any = of_kind(found, kind)[0]
        for part in path:
            place = place[part]
        place.update(fields)

    return plant


def edit_serve(change: Callable[[Document], None]) -> Plant:
    def plant(found: list[Document]) -> None:
        spec = of_kind(found, "RayService")[0]["spec"]
        config = yaml.safe_load(spec["serveConfigV2"])
        change(config)
        spec["serveConfigV2"] = yaml.safe_dump(config)

    return plant


def scaling_of(config: Document) -> Document:
    found: Document = config["applications"][0]["deployments"][0]["autoscaling_config"]
    return found


CLUSTER = ("RayService", "spec", "rayClusterConfig")
CONTAINER = (*CLUSTER, "workerGroupSpecs", 1, "template", "spec", "containers", 0)
WRONG: dict[str, tuple[Plant, str]] = {
    "unknown in RayService": (edit(*CLUSTER, enableAutoscaling=True), "enableAutoscaling"),
    "unknown in a container": (edit(*CONTAINER, volumeMount=[]), "volumeMount"),
    "unknown in RayService's metadata": (edit("RayService", "metadata", label={}), "label"),
    "wrong type in RayService": (edit(*CLUSTER, "workerGroupSpecs", 0, minReplicas="1"), "minReplicas"),
    "no such backend": (edit(*CLUSTER, "gcsFaultToleranceOptions", backend="sqlite"), "sqlite"),
    "no such authentication": (edit(*CLUSTER, "authOptions", mode="password"), "password"),
    "unknown in a NetworkPolicy": (edit("NetworkPolicy", "spec", "ingress", 0, form=[]), "form"),
    "unknown in a budget": (edit("PodDisruptionBudget", "spec", minAvailble=1), "minAvailble"),
    "unknown in a claim": (edit("PersistentVolumeClaim", "spec", storageClass="fast"), "storageClass"),
    "wrong type in a Service": (edit("Service", "spec", "ports", 0, port="http"), "port"),
    "a kind that is none": (edit("Service", kind="Servise"), "kind Servise"),
    "unknown to Ray Serve": (
        edit_serve(lambda config: config["applications"][0]["deployments"][0].update(replicas=2)),
        "replicas",
    ),
    "wrong value for Ray Serve": (edit_serve(lambda config: scaling_of(config).update(max_replicas=0)), "max_replicas"),
    "unknown in the scaling of a model": (
        edit_serve(lambda config: scaling_of(config).update(max_replica=8)),
        "'max_replica'",
    ),
    "unknown to AppConfig": (
        edit_serve(lambda config: config["applications"][0]["args"].update(contxt=1)),
        "unknown key `contxt`",
    ),
    "unknown at the top of the Serve config": (edit_serve(lambda config: config.update(proxy="no")), "`proxy`"),
    "a claim that is not there": (edit("PersistentVolumeClaim", "metadata", name="other"), "no claim windfarm-data"),
    "settings that are not there": (edit("ConfigMap", "metadata", name="other"), "no ConfigMap windfarm-environment"),
    "a Service for no pod": (edit("Service", "spec", selector={"app": "windfarm"}), "chooses no pod"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_wrong_field_is_caught(name: str) -> None:
    plant, said = WRONG[name]
    right = documents("mixtral-2x4x40gb")
    found = copy.deepcopy(right)
    plant(found)
    changed = [item for item in found if item not in right]
    problems = [result.problem for item in changed for result in check_document("m", item) if result.problem]
    problems += lost_references(found)
    assert any(said in problem for problem in problems), problems


def test_the_command_fails_on_a_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = MIXTRAL.read_text(encoding="utf-8")
    wrong.write_text(text.replace("enableInTreeAutoscaling:", "enableInTreeAutoscalling:"), encoding="utf-8")
    assert main([str(wrong)]) == 1
    output = capsys.readouterr().out
    assert "enableInTreeAutoscalling" in output
    assert output.splitlines()[-1].endswith("passed, 1 failed")


def test_a_key_that_stands_twice_is_caught(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("kind: Service\nkind: Secret\n", encoding="utf-8")
    (result,) = check_file(wrong)
    assert "'kind' stands twice" in (result.problem or "")


def test_an_empty_file_is_no_success(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("", encoding="utf-8")
    assert [result.problem for result in check_file(empty)] == ["it holds no object"]


# What the manifests promise


@pytest.mark.parametrize("profile", PROFILES)
def test_ray_scales_wants_its_token_and_keeps_its_state(profile: str) -> None:
    config = cluster(profile)
    assert config["rayVersion"] == SUPPORTED_RAY
    assert config["enableInTreeAutoscaling"] is True
    assert config["autoscalerOptions"]["version"] == "v2"
    assert config["authOptions"] == {"mode": "token"}
    assert config["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert config["gcsFaultToleranceOptions"]["storage"]["size"]


@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_is_reached_from_outside_and_the_dashboard_by_the_operator_alone(profile: str) -> None:
    found = documents(profile)
    assert cluster(profile)["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert {item["spec"]["type"] for item in of_kind(found, "Service")} == {"ClusterIP"}
    assert of_kind(found, "Ingress") == []
    assert "enableIngress" not in cluster(profile)["headGroupSpec"]
    reaching = [
        (policy["metadata"]["name"], rule)
        for policy in of_kind(found, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
        if any(port["port"] == 8265 for port in rule.get("ports", ()))
    ]
    ((name, rule),) = reaching
    assert name == "windfarm-operator"
    assert rule["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    (inside,) = [p for p in of_kind(found, "NetworkPolicy") if p["metadata"]["name"] == "windfarm-inside"]
    assert inside["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert inside["spec"]["ingress"] == [{"from": [{"podSelector": inside["spec"]["podSelector"]}]}]


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_hold_to_the_restricted_standard(profile: str) -> None:
    (namespace,) = of_kind(documents(profile), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [container["securityContext"] for container in containers(profile)]
    contexts.append(cluster(profile)["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["runAsNonRoot"] is True
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for pod in pod_templates(ray_service(profile)):
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000


@pytest.mark.parametrize("profile", PROFILES)
def test_every_container_has_probes_and_the_same_request_and_limit(profile: str) -> None:
    for container in containers(profile):
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()


@pytest.mark.parametrize("profile", PROFILES)
def test_no_probe_asks_the_proxy_of_serve(profile: str) -> None:
    """KubeRay adds a probe of Serve's proxy to workers without one of their own; windfarm runs no proxy."""
    assert serve(profile)["proxy_location"] == "Disabled"
    for container in containers(profile):
        assert "exec" not in container["readinessProbe"]
        assert container["readinessProbe"]["httpGet"]["path"] in ("/health", "/api/healthz")


@pytest.mark.parametrize("profile", PROFILES)
def test_secrets_come_by_name_only(profile: str) -> None:
    assert of_kind(documents(profile), "Secret") == []
    text = (FOLDER / f"{profile}.yaml").read_text(encoding="utf-8")
    for name in ("WINDFARM_INTERNAL_SECRET", "WINDFARM_DATABASE_URL", "WINDFARM_QDRANT_URL", "RAY_AUTH_TOKEN"):
        assert f"{name}:" not in text
    used = {
        source["secretRef"]["name"] for c in containers(profile) for source in c["envFrom"] if "secretRef" in source
    }
    assert used == set(OPERATORS_SECRETS)


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_platform_sees_database_and_qdrant(profile: str) -> None:
    for pod in pod_templates(ray_service(profile)):
        sources = pod["spec"]["containers"][0]["envFrom"]
        has_stores = {"secretRef": {"name": "windfarm-stores"}} in sources
        assert has_stores == (pod["metadata"]["labels"]["app.kubernetes.io/component"] == "platform")


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_get_the_same_settings_as_processes_on_a_laptop(profile: str) -> None:
    (settings,) = of_kind(documents(profile), "ConfigMap")
    assert NO_TELEMETRY.items() <= settings["data"].items()
    assert RAY_VARIABLES.items() <= settings["data"].items()
    assert settings["data"]["WINDFARM_ELASTIC_NODES"] == "1"
    for container in containers(profile):
        variables = {item["name"]: item.get("valueFrom", {}) for item in container["env"]}
        assert variables["WINDFARM_INTERNAL_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}


@pytest.mark.parametrize("profile", PROFILES)
def test_what_owns_the_folder_is_pinned_to_the_pod_that_has_it(profile: str) -> None:
    (platform,) = [item for item in cluster(profile)["workerGroupSpecs"] if item["groupName"] == "platform"]
    assert (platform["minReplicas"], platform["maxReplicas"]) == (1, 1)
    assert platform["rayStartParams"]["resources"] == """'{"windfarm-platform": 1}'"""
    for application in serve(profile)["applications"]:
        for override in application["deployments"]:
            wants = override["ray_actor_options"].get("resources", {})
            assert ("windfarm-platform" in wants) == (override["name"] != "ModelServer")


@pytest.mark.parametrize("profile", PROFILES)
def test_ranks_fit_their_pods_and_scaling_reaches_every_pod(profile: str) -> None:
    args, override = model_of(profile)
    models = group(profile, "models")
    limits = models["template"]["spec"]["containers"][0]["resources"]["limits"]
    options, scaling = override["ray_actor_options"], override["autoscaling_config"]
    assert scaling["policy"]["policy_function"] == "services.scaling:ScaleByNeed"
    assert scaling["min_replicas"] % args.get("data_parallel_size", 1) == 0
    assert scaling["max_replicas"] % args.get("data_parallel_size", 1) == 0
    per_pod = scaling["max_replicas"] // models["maxReplicas"]
    assert options["num_cpus"] * per_pod <= int(limits["cpu"])
    assert options["memory"] * per_pod <= int(limits["memory"].removesuffix("Gi")) * 2**30
    assert options.get("num_gpus", 0) * per_pod == limits.get("nvidia.com/gpu", 0)
    assert models["minReplicas"] == scaling["min_replicas"] // per_pod


def test_mixtral_runs_as_gangs_of_four_on_either_node() -> None:
    args, override = model_of("mixtral-2x4x40gb")
    assert args["data_parallel_size"] == 4
    assert (override["autoscaling_config"]["min_replicas"], override["autoscaling_config"]["max_replicas"]) == (4, 8)
    assert override["ray_actor_options"]["num_gpus"] == 1
    spec = group("mixtral-2x4x40gb", "models")["template"]["spec"]
    assert spec["topologySpreadConstraints"][0]["topologyKey"] == "topology.kubernetes.io/zone"


def test_experts_lie_on_four_nodes_without_a_gpu() -> None:
    args, _ = model_of("cpu-experts-4")
    models = group("cpu-experts-4", "models")
    assert args["data_parallel_size"] == models["minReplicas"] == 4
    assert "nvidia" not in str(models)
    assert models["template"]["spec"]["containers"][0]["image"] == "windfarm:cpu"


def test_pods_without_a_gpu_do_not_see_those_of_their_node() -> None:
    hidden = [
        any(item["name"] == "NVIDIA_VISIBLE_DEVICES" and item["value"] == "void" for item in container["env"])
        for container in containers("one-gpu")
    ]
    assert hidden == [True, True, False]


def test_the_readme_names_every_file_and_every_secret_that_somebody_must_make() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for profile in PROFILES:
        assert f"`{profile}.yaml`" in readme
    for secret in OPERATORS_SECRETS:
        assert f"create secret generic {secret} " in readme
    assert "have not been applied to a\ncluster" in readme


def test_one_output_has_one_format() -> None:
    command = ["plan", "mistral-7b", "--nodes", str(FOLDER.parent / "nodes" / "one-gpu.yaml"), "--emit", "kuberay"]
    assert CliRunner().invoke(app, command).exit_code == 0
    answer = CliRunner().invoke(app, [*command, "--json"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert answer.exit_code == 2
    assert "leave --json out" in answer.output
