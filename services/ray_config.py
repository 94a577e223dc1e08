"""Loads `ray_config.yaml` and checks it before anything starts; all problems are reported at once.

The file is a Ray Serve config file, but closed: Ray ignores unknown keys at the top and in an application, here they
are refused with line and nearest valid key. Only our own builders are allowed, so that `args` can be checked too.
Nothing of Ray is imported: the command line stays quick, a test compares the keys with Ray's own schema.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from services.config import AppConfig, EmbeddingConfig, ModelConfig, PlatformConfig, Section, StoreConfig
from services.scaling_config import SCALING_POLICY, ModelScaling
from services.setup_errors import ConfigError

Location = tuple[str | int, ...]
SectionT = TypeVar("SectionT", bound=Section)


class ActorOptions(Section):
    """What one replica asks Ray for. The block replaces the computed one as a whole, so both amounts are named."""

    num_cpus: Annotated[float, Field(ge=0)]
    memory: Annotated[float, Field(ge=0)]
    """Bytes."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    resources: dict[str, float] | None = None
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    runtime_env: dict[str, Any] | None = None


class DeploymentOverride(Section):
    """One entry of `deployments:`: replica counts and resources."""

    name: str
    num_replicas: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    max_queued_requests: int | None = None
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    autoscaling_config: dict[str, Any] | None = None
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] | None = None
    graceful_shutdown_wait_loop_s: Annotated[float, Field(gt=0)] | None = None
    health_check_period_s: Annotated[float, Field(gt=0)] | None = None
    health_check_timeout_s: Annotated[float, Field(gt=0)] | None = None
    ray_actor_options: ActorOptions | None = None
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    logging_config: dict[str, Any] | None = None

    @property
    def first_replicas(self) -> int | None:
        """Replicas after a start; none where this does not say it, or says that the first request starts them."""
        scaling = self.autoscaling_config or {}
        if (scaling.get("policy") or {}).get("policy_function") == SCALING_POLICY:
            return ModelScaling.model_validate(scaling).first_replicas or None
        return self.num_replicas if isinstance(self.num_replicas, int) else None


class ApplicationEntry(Section):
    """One entry of `applications:`."""

    name: str
    import_path: str
    route_prefix: None
    """Always null: no Serve proxy runs, each application has its own way in."""
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: list[DeploymentOverride] = Field(default_factory=list)
    runtime_env: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None


class ServeFile(Section):
    """The whole file."""

    proxy_location: Literal["Disabled"]
    """Serve's own proxy would listen on all interfaces; the platform application has its own listener."""
    applications: list[ApplicationEntry]
    http_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Builder:
    """A function of `services.app` that makes an application: its `args` and the deployments that it makes."""

    config: type[Section]
    deployments: tuple[str, ...]
    single: tuple[str, ...] = ()
    """Deployments that must have exactly one replica."""
    scales_by_need: bool = False
    """Serve counts no requests of its replicas, so only our own policy can scale them."""


BUILDERS: Mapping[str, Builder] = {
    "services.app:build_store": Builder(StoreConfig, ("Store",), single=("Store",)),
    "services.app:build_embedding": Builder(EmbeddingConfig, ("Embedding",)),
    "services.app:build_model": Builder(ModelConfig, ("ModelServer",), scales_by_need=True),
    "services.app:build_platform": Builder(PlatformConfig, ("Gateway", "Ui", "Balancer"), single=("Ui", "Balancer")),
}
FIXED_NAMES = {
    "services.app:build_store": "store",
    "services.app:build_embedding": "embed",
    "services.app:build_platform": "platform",
}


Slices = Sequence[tuple[ApplicationEntry, Section]]


@dataclass(frozen=True, slots=True)
class RayConfig:
    """A checked file: typed slices for us, the plain dictionary for Ray."""

    path: Path
    app: AppConfig
    applications: tuple[ApplicationEntry, ...]
    serve: dict[str, Any]

    def override(self, application: str, deployment: str) -> DeploymentOverride | None:
        """The `deployments:` entry of one deployment, if the file has one."""
        for entry in self.applications:
            if entry.name == application:
                return next((item for item in entry.deployments if item.name == deployment), None)
        return None


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong with the file."""

    line: int
    place: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.place}: {self.message}" if self.place else f"line {self.line}: {self.message}"


def load_ray_config(path: Path) -> RayConfig:
    """Read and check the file; raises `ConfigError` that lists every problem with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Name another file with --config.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    return parse_ray_config(text, path)


def parse_ray_config(text: str, path: Path) -> RayConfig:
    """Check the text of a file; `path` is only named in messages."""
    root, lines, problems = _read_yaml(text, path)
    _anchor_sources(root, path.absolute().parent)
    serve_file, found = _check(ServeFile, root, lines, ())
    problems += found
    entries = serve_file.applications if serve_file else _readable_applications(root)
    slices: list[tuple[ApplicationEntry, Section]] = []
    for index, entry in enumerate(entries):
        slice_, found = _check_application(index, entry, lines)
        problems += found
        if slice_ is not None:
            slices.append((entry, slice_))
    if serve_file is not None:
        problems += _check_whole(serve_file.applications, slices, lines)
    if problems or serve_file is None:
        unique = sorted(set(problems))
        listed = "\n".join(f"  {problem}" for problem in unique)
        noun = "problem" if len(unique) == 1 else "problems"
        raise ConfigError(f"{path} has {len(unique)} {noun}:\n{listed}")
    return RayConfig(path, _join(slices), tuple(entries), root)


def _read_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[Location, int], list[Problem]]:
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path} is not valid YAML: {place}{getattr(error, 'problem', error)}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no configuration: expected keys such as `proxy_location` and `applications`.")
    lines: dict[Location, int] = {(): 1}
    assert tree is not None, "a mapping was loaded, so there is a tree"
    problems = list(_walk(tree, (), lines))
    return value, lines, problems


def _anchor_sources(root: dict[str, Any], folder: Path) -> None:
    """Models that lie beside the file get their whole path: replicas work in another folder than the command line."""
    applications = root.get("applications")
    for application in applications if isinstance(applications, list) else []:
        args = application.get("args") if isinstance(application, dict) else None
        if not isinstance(args, dict):
            continue
        source = args.get("source")
        if isinstance(source, str) and source.startswith(("./", "../", "~")):
            args["source"] = str((folder / Path(source).expanduser()).resolve())
        for name in ("expert_trace", "plan"):
            if isinstance(args.get(name), str):
                args[name] = str((folder / Path(args[name]).expanduser()).resolve())


def _walk(node: yaml.Node, place: Location, lines: dict[Location, int]) -> Iterator[Problem]:
    """Note the line of every key and entry; yield keys that stand twice, which YAML readers silently drop."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                yield Problem(line, _name(place), f"key `{key}` stands twice (first in line {seen[key]})")
            seen[key] = line
            lines[(*place, key)] = line
            yield from _walk(value_node, (*place, key), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
            yield from _walk(item, (*place, index), lines)


def _check(
    model: type[SectionT], value: Any, lines: Mapping[Location, int], prefix: Location
) -> tuple[SectionT | None, list[Problem]]:
    try:
        return model.model_validate(value), []
    except ValidationError as error:
        return None, [_explain(model, item, lines, prefix) for item in error.errors()]


def _explain(model: type[BaseModel], error: Any, lines: Mapping[Location, int], prefix: Location) -> Problem:
    place = _place_in_file((*prefix, *error["loc"]), lines)
    if error["type"] == "extra_forbidden":
        message = _unknown_key(str(error["loc"][-1]), _keys_at(model, error["loc"]))
        return Problem(_line(place, lines), _name(place[:-1]), message)
    if error["type"] == "missing":
        return Problem(_line(place, lines), _name(place), f"key `{error['loc'][-1]}` is missing")
    message = error["msg"][0].lower() + error["msg"][1:]
    return Problem(_line(place, lines), _name(place), f"{message}, not {error['input']!r}")


def _place_in_file(location: Location, lines: Mapping[Location, int]) -> Location:
    """`location` without what does not stand in the file: a missing key, the branch of a union."""
    place: Location = ()
    for part in location:
        if (*place, part) in lines:
            place = (*place, part)
    return place


def _line(location: Location, lines: Mapping[Location, int]) -> int:
    while location not in lines:
        location = location[:-1]
    return lines[location]


def _unknown_key(key: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(sorted(valid))}"
    return f"unknown key `{key}`; {hint}"


def _keys_at(model: type[BaseModel], location: Location) -> list[str]:
    """Valid keys of the section in which the last part of `location` stands."""
    current: type[BaseModel] = model
    for part in location[:-1]:
        if isinstance(part, str) and part in current.model_fields:
            inner = _section_in(current.model_fields[part].annotation)
            current = inner or current
    return list(current.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _section_in(argument)) is not None:
            return found
    return None


def _name(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _readable_applications(root: Mapping[str, Any]) -> list[ApplicationEntry]:
    """The applications that can be read although the file as a whole has problems, to find theirs as well."""
    found = []
    values = root.get("applications")
    for value in values if isinstance(values, list) else []:
        known = {key: item for key, item in value.items() if key in ApplicationEntry.model_fields} if value else {}
        try:
            found.append(ApplicationEntry.model_validate({**known, "deployments": [], "route_prefix": None}))
        except ValidationError:
            # Reported already with the file as a whole; a placeholder keeps the numbering.
            found.append(ApplicationEntry(name="", import_path="", route_prefix=None))
    return found


def _check_application(
    index: int, entry: ApplicationEntry, lines: Mapping[Location, int]
) -> tuple[Section | None, list[Problem]]:
    place: Location = ("applications", index)
    if not entry.import_path:
        return None, []
    builder = BUILDERS.get(entry.import_path)
    if builder is None:
        near = difflib.get_close_matches(entry.import_path, BUILDERS, n=1, cutoff=0.0)
        message = f"`{entry.import_path}` builds nothing of windfarm; did you mean `{near[0]}`?"
        return None, [Problem(_line((*place, "import_path"), lines), _name((*place, "import_path")), message)]
    slice_, problems = _check(builder.config, entry.args, lines, (*place, "args"))
    problems += _check_name(entry, slice_, place, lines)
    problems += _check_ranks(entry, slice_, place, lines)
    problems += _check_deployments(entry, builder, place, lines)
    return slice_, problems


def _check_name(
    entry: ApplicationEntry, slice_: Section | None, place: Location, lines: Mapping[Location, int]
) -> list[Problem]:
    wanted = f"llm-{slice_.id}" if isinstance(slice_, ModelConfig) else FIXED_NAMES.get(entry.import_path, entry.name)
    if entry.name == wanted:
        return []
    message = f"this application must be named `{wanted}`, not `{entry.name}`"
    return [Problem(_line((*place, "name"), lines), _name((*place, "name")), message)]


def _check_ranks(
    entry: ApplicationEntry, model: Section | None, place: Location, lines: Mapping[Location, int]
) -> list[Problem]:
    """What can be said of a model's ranks without its files."""
    if not isinstance(model, ModelConfig):
        return []

    def problem(where: Location, message: str) -> Problem:
        return Problem(_line((*place, *where), lines), _name((*place, *where)), message)

    found = []
    if model.num_ranks > 1 and model.engine in ("llamacpp", "remote"):
        found.append(problem(("args", "engine"), f"only vLLM can cut a model into {model.num_ranks} ranks; use vllm"))
    sources = (model.expert_trace, model.plan, model.expert_ranks)
    if model.expert_placement == "planned" and sources == (None, None, None):
        message = "`planned` needs `expert_trace` (from `windfarm experts --save`) or `plan`"
        found.append(problem(("args", "expert_placement"), message))
    if model.expert_ranks is not None and (model.expert_placement == "linear" or sources[:2] != (None, None)):
        message = "goes with `expert_placement: planned`, without `expert_trace` and `plan`"
        found.append(problem(("args", "expert_ranks"), message))
    size = model.data_parallel_size
    for index, override in enumerate(entry.deployments):
        if size == 1:
            continue
        here: Location = ("deployments", index)
        if isinstance(override.num_replicas, int) and override.num_replicas % size:
            message = f"{override.num_replicas} is no multiple of {size}: each rank of a gang is a replica"
            found.append(problem((*here, "num_replicas"), message))
        for name in ("max_replicas_per_node", "placement_group_strategy"):
            if getattr(override, name) is not None:
                found.append(problem((*here, name), "a gang is placed as a whole; leave this out"))
    return found


def _check_deployments(
    entry: ApplicationEntry, builder: Builder, place: Location, lines: Mapping[Location, int]
) -> list[Problem]:
    problems = []
    for index, override in enumerate(entry.deployments):
        here: Location = (*place, "deployments", index)
        line = _line((*here, "name"), lines)
        if override.name not in builder.deployments:
            near = difflib.get_close_matches(override.name, builder.deployments, n=1, cutoff=0.0)
            message = f"unknown deployment `{override.name}`; did you mean `{near[0]}`?"
            problems.append(Problem(line, _name((*here, "name")), message))
        elif override.name in builder.single and override.num_replicas not in (None, 1):
            message = f"`{override.name}` has exactly one replica: it owns what it keeps; set num_replicas to 1"
            problems.append(Problem(line, _name(here), message))
        if override.autoscaling_config is not None and builder.scales_by_need:
            problems += _check_scaling(entry, override, (*here, "autoscaling_config"), lines)
    return problems


def _check_scaling(
    entry: ApplicationEntry, override: DeploymentOverride, place: Location, lines: Mapping[Location, int]
) -> list[Problem]:
    scaling, problems = _check(ModelScaling, override.autoscaling_config, lines, place)
    if override.num_replicas is not None:
        message = "the number is either fixed (num_replicas) or scaled (autoscaling_config); take one of them away"
        problems.append(Problem(_line(place, lines), _name(place), message))
    if "policy" not in (override.autoscaling_config or {}):
        message = f"write `policy: {{policy_function: {SCALING_POLICY}}}`; Serve's own policy counts nothing here"
        problems.append(Problem(_line(place, lines), _name(place), message))
    size = entry.args.get("data_parallel_size", 1)
    for name, message in scaling.problems(size if isinstance(size, int) and size > 0 else 1) if scaling else ():
        problems.append(Problem(_line((*place, name), lines), _name((*place, name)), message))
    return problems


def _check_whole(
    entries: Sequence[ApplicationEntry],
    slices: Sequence[tuple[ApplicationEntry, Section]],
    lines: Mapping[Location, int],
) -> list[Problem]:
    problems = []
    counts = Counter(entry.name for entry in entries)
    for index, entry in enumerate(entries):
        if counts[entry.name] > 1:
            message = (
                f"application `{entry.name}` stands {counts[entry.name]} times; each name and model id is used once"
            )
            problems.append(Problem(lines[("applications", index)], f"applications[{index}]", message))
    present = {entry.import_path for entry in entries}
    for import_path, name in FIXED_NAMES.items():
        if import_path not in present:
            message = f"application `{name}` ({import_path}) is missing"
            problems.append(Problem(lines[("applications",)], "applications", message))
    return problems + _check_default_model(entries, slices, lines) + _check_reranker(entries, slices, lines)


def _check_default_model(
    entries: Sequence[ApplicationEntry],
    slices: Sequence[tuple[ApplicationEntry, Section]],
    lines: Mapping[Location, int],
) -> list[Problem]:
    models = [slice_.id for _, slice_ in slices if isinstance(slice_, ModelConfig)]
    for entry, slice_ in slices:
        if isinstance(slice_, PlatformConfig) and models and slice_.default_model not in models:
            place: Location = ("applications", entries.index(entry), "args", "default_model")
            message = f"no model `{slice_.default_model}` is configured; configured are: {', '.join(models)}"
            return [Problem(_line(place, lines), _name(place), message)]
    return []


def _check_reranker(
    entries: Sequence[ApplicationEntry],
    slices: Sequence[tuple[ApplicationEntry, Section]],
    lines: Mapping[Location, int],
) -> list[Problem]:
    """Two sections must agree; the first search would be the first to notice."""
    has_folder = any(isinstance(slice_, EmbeddingConfig) and slice_.reranker is not None for _, slice_ in slices)
    for entry, slice_ in slices:
        if isinstance(slice_, PlatformConfig) and slice_.retrieval.rerank == "embed" and not has_folder:
            place: Location = ("applications", entries.index(entry), "args", "retrieval", "rerank")
            message = "`embed` needs the folder of a cross-encoder; name it as `reranker` in the section of `embed`"
            return [Problem(_line(place, lines), _name(place), message)]
    return []


def _join(slices: Slices) -> AppConfig:
    parts: dict[str, Any] = {"models": {}}
    for _, slice_ in slices:
        match slice_:
            case ModelConfig():
                parts["models"][slice_.id] = slice_
            case StoreConfig():
                parts["store"] = slice_
            case EmbeddingConfig():
                parts["embed"] = slice_
            case PlatformConfig():
                parts["platform"] = slice_
    return AppConfig.model_validate(parts)
