"""Checks the Kubernetes manifests offline: `make manifests-check`, or `python -m infra.kuberay.check FILE...`.

RayService objects are held to KubeRay's own definition, every other kind to the schemas of Kubernetes, unknown fields
refused in both; Serve configs are held to Ray's schema and to windfarm's. References between objects must lead
somewhere. What only a cluster can tell (images, storage classes, quotas) is not checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from infra.kuberay.references import lost_references
from services.ray_config import parse_ray_config
from services.setup_errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kuberay"
DEFINITION = ROOT / "tests" / "data" / "kuberay-crds" / "ray.io_rayservices.yaml"
KUBERNETES = "1.34"
"""Version whose schemas count; fields that are used here have been the same since 1.25."""

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one object; `problem` is None where it passed."""

    subject: str
    against: str
    problem: str | None

    def __str__(self) -> str:
        return f"{'FAILED' if self.problem else 'passed'}  {self.subject}: {self.against}" + (
            f"\n        {self.problem}" if self.problem else ""
        )


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    files = [Path(name) for name in given] or sorted(FOLDER.glob("*.yaml"))
    results = [result for file in files for result in check_file(file)]
    for result in results:
        print(result)
    failed = sum(result.problem is not None for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed or not results else 0


def check_file(path: Path) -> list[Result]:
    """All checks of one file."""
    try:
        documents = read_documents(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return [Result(path.name, "YAML", str(error))]
    if not documents:
        return [Result(path.name, "YAML", "it holds no object")]
    results = [result for document in documents for result in check_document(path.name, document)]
    lost = "; ".join(lost_references(documents)) or None
    return [*results, Result(path.name, "references between objects", lost)]


def check_document(file: str, document: Document) -> Iterator[Result]:
    subject = f"{file} {document.get('kind')}/{document.get('metadata', {}).get('name')}"
    if document.get("kind") != "RayService":
        yield Result(subject, f"Kubernetes {KUBERNETES}", kubernetes_problem(document))
        return
    yield Result(subject, "KubeRay's definition", definition_problem(document))
    text = document.get("spec", {}).get("serveConfigV2", "")
    yield Result(subject, "serveConfigV2 against Ray's schema", serve_problem(text))
    yield Result(subject, "serveConfigV2 against AppConfig", config_problem(text))


def kubernetes_problem(document: Document) -> str | None:
    """Why Kubernetes would refuse an object of its own kinds."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return explain(error)
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return None


def definition_problem(document: Document) -> str | None:
    """Why an API server with KubeRay's definitions would refuse a RayService or drop a part of it."""
    error = jsonschema.exceptions.best_match(ray_service_validator().iter_errors(document))
    if error is not None:
        return explain(error)
    # The definition leaves `metadata` to Kubernetes, so an object of its own kinds lends its schema.
    lender = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    return kubernetes_problem(lender)


def serve_problem(text: str) -> str | None:
    """Why Ray Serve would refuse a configuration, the scaling of deployments included, which it reads only later."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(text))
        for application in config.applications:
            for deployment in application.deployments:
                if isinstance(scaling := deployment.autoscaling_config, Mapping):
                    AutoscalingConfig.model_validate(scaling)
                    if unknown := sorted(set(scaling) - set(AutoscalingConfig.model_fields)):
                        return f"{deployment.name}: autoscaling_config has no field {unknown[0]!r}"
    except (yaml.YAMLError, ValueError) as error:
        return str(error)
    return None


def config_problem(text: str) -> str | None:
    try:
        parse_ray_config(text, Path("serveConfigV2"))
    except ConfigError as error:
        return str(error)
    return None


def explain(error: jsonschema.ValidationError) -> str:
    """The place and what is wrong there, without the value that may be a whole object."""
    place = ".".join(str(part) for part in error.absolute_path)
    return f"{place or 'the object'}: {error.message[:300]}"


@cache
def ray_service_validator() -> Any:
    definition = yaml.load(DEFINITION.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    version = next(item for item in definition["spec"]["versions"] if item["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """The schema with every object closed: Kubernetes drops what it does not know, here that is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), Mapping) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        copy["additionalProperties"] = False
    return copy


class _UniqueKeys(yaml.CSafeLoader):
    """Refuses a key that stands twice, of which YAML readers silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_documents(text: str) -> list[Document]:
    return [document for document in yaml.load_all(text, Loader=_UniqueKeys) if document is not None]


if __name__ == "__main__":
    sys.exit(main())
