"""What token ids mean has a name: the same for a copy of a model, another one for any other version."""

import shutil
from pathlib import Path

import pytest

from cluster.model_identity import model_identity

LARGE = 40 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 3}')
    (folder / "tokenizer.json").write_text('{"a": 0, "b": 1}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_copy_is_the_same_model_and_its_readme_does_not_count(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("A model.")
    assert model_identity(copy, {}) == model_identity(folder, {})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_other_weights_and_another_tokenizer_are_another_model(folder: Path, name: str) -> None:
    before = model_identity(folder, {})
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[::-1])
    assert model_identity(folder, {}) != before


def test_options_count_where_they_change_what_is_computed(folder: Path) -> None:
    assert model_identity(folder, {"quantization": "fp8"}) != model_identity(folder, {})
    assert model_identity(folder, {"max_num_batched_tokens": 512}) == model_identity(folder, {})


@pytest.mark.parametrize("at", [0, LARGE // 2, LARGE - 1])
def test_large_files_are_told_apart_by_samples(tmp_path: Path, at: int) -> None:
    files = []
    for name, value in (("a.gguf", b"\0"), ("b.gguf", b"\1" * (64 << 10))):
        files.append(tmp_path / name)
        with files[-1].open("wb") as file:
            file.truncate(LARGE)
            file.seek(at)
            file.write(value)
            file.truncate(LARGE)
    other, changed = files
    copy = tmp_path / "copy.gguf"
    copy.hardlink_to(other)
    assert model_identity(copy, {}) == model_identity(other, {}) != model_identity(changed, {})


def test_a_model_in_several_files_is_all_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    (tmp_path / "other-00001-of-00002.gguf").write_bytes(b"GGUF")
    before = model_identity(parts[0], {})
    parts[1].write_bytes(b"fugg")
    assert model_identity(parts[0], {}) != before
