"""`engine: auto` takes what the machine and the model allow, and says what to do where nothing fits."""

from pathlib import Path

import pytest

from cluster.catalogue import ResolvedModel, resolve
from cluster.engines.choice import EngineChoice, Hardware, choose_engine, make_engine
from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from cluster.errors import ClusterError

GPU = Hardware(has_gpu=True, has_vllm=True)
CPU = Hardware(has_gpu=False, has_vllm=True)
WITHOUT_VLLM = Hardware(has_gpu=False, has_vllm=False)

GGUF = ResolvedModel("m.gguf", "m", "file", ("gguf",), path=Path("m.gguf"))
FOLDER = ResolvedModel("m", "m", "folder", ("hf",), path=Path("m"))
REMOTE = resolve("https://example.com/v1")
TINY = resolve("tiny")


@pytest.mark.parametrize(
    ("model", "hardware", "expected"),
    [
        (TINY, CPU, EngineChoice("llamacpp", "gguf", uses_gpu=False)),
        (TINY, WITHOUT_VLLM, EngineChoice("llamacpp", "gguf", uses_gpu=False)),
        (TINY, GPU, EngineChoice("vllm", "hf", uses_gpu=True)),
        (GGUF, GPU, EngineChoice("llamacpp", "gguf", uses_gpu=False)),
        (FOLDER, GPU, EngineChoice("vllm", "hf", uses_gpu=True)),
        (FOLDER, CPU, EngineChoice("vllm", "hf", uses_gpu=False)),
        (REMOTE, GPU, EngineChoice("remote", None, uses_gpu=False)),
    ],
)
def test_auto_fits_the_machine(model: ResolvedModel, hardware: Hardware, expected: EngineChoice) -> None:
    assert choose_engine(model, hardware) == expected


@pytest.mark.parametrize(
    ("model", "hardware", "wanted", "hint"),
    [
        (FOLDER, WITHOUT_VLLM, "auto", "make setup"),
        (FOLDER, CPU, "llamacpp", "engine: auto"),
        (GGUF, GPU, "vllm", "engine: auto"),
        (REMOTE, CPU, "vllm", "engine: remote"),
        (TINY, CPU, "remote", "https://"),
    ],
)
def test_what_does_not_fit_is_an_error_with_a_way_out(model, hardware, wanted, hint: str) -> None:
    with pytest.raises(ClusterError, match=hint):
        choose_engine(model, hardware, wanted)


@pytest.mark.parametrize("kind", ["llamacpp", "remote"])
def test_an_unknown_engine_option_is_refused_by_name(kind: str) -> None:
    location = TINY.entry.file.locate() if kind == "llamacpp" else "http://127.0.0.1:1/v1"
    choice = EngineChoice(kind, None, uses_gpu=False)
    with pytest.raises(ClusterError, match="warp_speed"):
        make_engine(choice, EngineSettings("m", location, options={"warp_speed": 9}))


@pytest.mark.parametrize("kind", ["llamacpp", "remote"])
def test_ranks_are_refused_where_the_engine_has_none(kind: str) -> None:
    settings = EngineSettings("m", "http://127.0.0.1:1/v1", parallelism=Parallelism(tensor_parallel_size=2))
    with pytest.raises(ClusterError, match=f"2 ranks with engine: {kind}"):
        make_engine(EngineChoice(kind, None, uses_gpu=False), settings)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    choice = EngineChoice("llamacpp", "gguf", uses_gpu=False)
    with pytest.raises(ClusterError, match="max_context to 8192 or less"):
        make_engine(choice, EngineSettings("m", TINY.entry.file.locate(), max_context=10_000))
