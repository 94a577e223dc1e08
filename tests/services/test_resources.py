"""What a model's replica asks Ray for is what its engine takes, and a model that does not fit is refused in numbers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from cluster.catalogue import resolve
from cluster.engines.memory import facts_of_gguf
from cluster.errors import ClusterError
from cluster.weights import hub
from cluster.weights.hub import fetch_from_hub
from services import app, supervisor
from services.config import ModelConfig
from services.preflight import Machine
from services.ray_config import RayConfig, parse_ray_config
from services.resources import GIB, MIB, model_resources
from services.setup_errors import StartRefused
from services.up_options import UpOptions

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"
SMALL_LAPTOP = Machine(num_cpus=4, num_gpus=0, total_memory=16 * GIB, free_memory=14 * GIB)
SEVEN_BILLION = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
"""Of Mistral 7B: a token takes 128 KiB of the cache, a context of 32768 tokens 4 GiB."""
OF_A_KNOWN_KIND = SEVEN_BILLION | {"model_type": "mistral", "intermediate_size": 14336, "vocab_size": 32768}
WEIGHTS = 4 * GIB


def write_gguf(path: Path, **more: object) -> Path:
    """The header of such a model, and behind it as many bytes (of a sparse file) as its weights would have."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(32)
    writer.add_context_length(32768)
    writer.add_embedding_length(4096)
    writer.add_head_count(32)
    writer.add_head_count_kv(more.get("kv_heads", 8))  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(WEIGHTS)
    return path


def write_checkpoint(folder: Path, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SEVEN_BILLION if config is None else config), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(WEIGHTS)
    return folder


def config_with(source: Path | str) -> RayConfig:
    """The configuration with another model beside `tiny`, as the file tells how to add one."""
    line = "  - {name: llm-big, route_prefix: null, import_path: services.app:build_model, "
    line += f"args: {{id: big, source: '{source}'}}}}"
    text = FILE.read_text(encoding="utf-8").replace("\n  - name: llm-tiny", f"\n{line}\n  - name: llm-tiny", 1)
    return parse_ray_config(text, FILE)


def memory(source: Path | str, home: Path, **more: object) -> int:
    return model_resources(ModelConfig(id="m", source=str(source), **more), home).memory  # type: ignore[arg-type]


def test_the_model_that_comes_along_asks_for_its_cache_and_starts_on_a_small_laptop(tmp_path: Path) -> None:
    cache = 8192 * 4 * 30 * 3 * 64 * 2 * 2
    assert memory("tiny", tmp_path) == pytest.approx(600 * MIB + cache + 1.2 * 98_362_432, abs=MIB)
    options = UpOptions(tmp_path, parse_ray_config(FILE.read_text(encoding="utf-8"), FILE), port=0)
    supervisor.refuse_unless_fit(options, Machine(2, 0, 8 * GIB, 6 * GIB))


def test_a_gguf_asks_for_the_whole_context_of_every_slot(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "big.gguf")
    assert memory(path, tmp_path) == pytest.approx(600 * MIB + 16 * GIB + 1.2 * WEIGHTS, abs=MIB)
    assert memory(path, tmp_path, max_context=4096, parallel_requests=1) == pytest.approx(
        600 * MIB + GIB // 2 + 1.2 * WEIGHTS, abs=MIB
    )


def test_layers_may_differ_in_their_heads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "big.gguf", kv_heads=[8] * 16 + [0] * 16)
    assert facts_of_gguf(path).bytes_per_token == 64 * 1024


def test_a_checkpoint_asks_for_what_vllm_is_told_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "big", OF_A_KNOWN_KIND)
    one_context = (32768 + 256) * 128 * 1024
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    ends, norms = 2 * 32768 * 4096, 65 * 4096
    # Linear layers in float32, embedding and output head in both types, the rest in half precision.
    loaded = 4 * linear + 6 * ends + 2 * norms
    step = 2 * 2048 * (2 * 4096 + 6144 + 2 * 14336) + 4 * 2 * 32768
    beside = 2048 * MIB + loaded + step
    for total, contexts in ((8 * GIB, 1), (64 * GIB, 2)):
        there = psutil.virtual_memory()._replace(total=total)
        monkeypatch.setattr(psutil, "virtual_memory", lambda there=there: there)
        assert memory(folder, tmp_path) == pytest.approx(beside + contexts * one_context, abs=MIB)
    in_float32 = 2048 * MIB + 4 * (linear + ends + norms) + 2 * step - 4 * 2 * 32768
    options = {"dtype": "float32"}
    assert memory(folder, tmp_path, engine_options=options) == pytest.approx(in_float32 + 16 * GIB, abs=MIB)
    other = write_checkpoint(tmp_path / "other")
    assert memory(other, tmp_path) == pytest.approx(2560 * MIB + 1.2 * WEIGHTS + 2 * one_context, abs=MIB)


def test_a_model_that_is_too_large_is_refused_with_what_it_needs_of_which_parts_and_what_is_there(
    tmp_path: Path,
) -> None:
    options = UpOptions(tmp_path, config_with(write_gguf(tmp_path / "big.gguf")), port=0)
    with pytest.raises(StartRefused) as refused:
        supervisor.refuse_unless_fit(options, SMALL_LAPTOP)
    text = str(refused.value)
    needed = "llm-big/ModelServer 21.4 (weights 4.8, KV cache 16.0 for max_context 32768 and parallel_requests 4, "
    assert f"{needed}engine 0.6)" in text
    assert "14.0 of 16.0 GiB are free" in text
    assert "smaller max_context or fewer parallel_requests" in text


def test_memory_gib_wins(tmp_path: Path) -> None:
    assert memory("tiny", tmp_path, memory_gib=5) == 5 * GIB


def test_a_context_that_the_model_cannot_have_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"trained for 32768 tokens\. Set max_context to 32768 or less"):
        memory(write_gguf(tmp_path / "big.gguf"), tmp_path, max_context=40000)


class Hub(ThreadingHTTPServer):
    """Tells the sizes of `owner/name` and gives none of it; gives `owner/other`, of which it tells no sizes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)


COMMIT = "c0ffee" * 6 + "c0de"
SIZES = {
    "config.json": 600,
    "model-1.safetensors": 3 * WEIGHTS,
    "model-2.safetensors": WEIGHTS,
    "consolidated.safetensors": 4 * WEIGHTS,
    "q4.gguf": 2 * WEIGHTS,
}
OTHER = {
    "README.md": b"not fetched",
    "config.json": json.dumps({**SEVEN_BILLION, "max_position_embeddings": 131072}).encode(),
    "model.safetensors": save({"x": np.zeros(4, np.float32)}),
}


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.path == "/api/models/owner/name?blobs=true":
            files = [{"rfilename": name, "size": size} for name, size in SIZES.items()]
            self._send(json.dumps({"id": "owner/name", "siblings": files}).encode())
        elif path == "/api/models/owner/other/revision/main":
            self._send(json.dumps({"id": "owner/other", "sha": COMMIT}).encode())
        elif path == f"/api/models/owner/other/tree/{COMMIT}":
            files = [{"type": "file", "path": name, "size": len(OTHER[name]), "oid": name} for name in OTHER]
            self._send(json.dumps(files).encode())
        elif path.startswith(f"/owner/other/resolve/{COMMIT}/"):
            self._send(OTHER[Path(path).name])
        else:
            self._send(b"{}", 404)

    do_HEAD = do_GET

    def _send(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{Path(self.path).name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.ask_weight_bytes.cache_clear()
    yield address
    server.shutdown()
    server.server_close()
    hub.ask_weight_bytes.cache_clear()


@pytest.mark.parametrize(
    ("source", "weights"), [("hf:owner/name", 4 * WEIGHTS), ("hf:owner/name/q4.gguf", 2 * WEIGHTS)]
)
def test_a_model_of_a_hub_is_refused_by_the_hubs_sizes_before_it_is_fetched(
    hub_address: str, source: str, weights: int, tmp_path: Path
) -> None:
    needed = rf"llm-big/ModelServer at least .*weights {1.2 * weights / GIB:.1f}, engine"
    with pytest.raises(StartRefused, match=needed):
        supervisor.refuse_unless_fit(UpOptions(tmp_path, config_with(source), port=0), SMALL_LAPTOP)


def test_an_unknown_size_is_no_size_of_nothing(
    hub_address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = model_resources(ModelConfig(id="m", source="hf:owner/other"), tmp_path, ask_hub=True)
    assert each.is_lower_bound
    assert "weights of unknown size" in each.parts
    monkeypatch.setenv("WINDFARM_HOME", str(tmp_path))
    app.build_model(ModelConfig(id="m", source="hf:owner/other"))
    assert "set memory_gib" in caplog.text


def test_what_was_fetched_is_looked_at_again_before_anything_is_started(
    hub_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "read_machine", lambda: SMALL_LAPTOP)
    options = UpOptions(tmp_path, config_with("hf:owner/other"), port=0)
    supervisor.refuse_unless_fit(options, SMALL_LAPTOP)  # as far as one knows
    with pytest.raises(StartRefused, match=r"llm-big/ModelServer \d\d\.\d \(weights 0\.0, KV cache 16\.0 for"):
        supervisor.start(options, print, lambda _, home: fetch_from_hub(resolve("hf:owner/other"), home, ignore))
    assert not list((tmp_path / "models").rglob("README.md"))


def ignore(step: str, fraction: float) -> None:
    """Nobody wants to see progress."""
