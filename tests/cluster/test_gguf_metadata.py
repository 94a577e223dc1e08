"""GGUF metadata is read without the tensors, and a damaged file is a clear error."""

from pathlib import Path

import pytest

from cluster.catalogue import TINY
from cluster.errors import ModelDamaged
from cluster.gguf_metadata import read_gguf_metadata


def test_the_model_that_comes_along_tells_its_context_and_vocabulary() -> None:
    metadata = read_gguf_metadata(TINY.file.locate())
    assert metadata.architecture == "llama"
    assert metadata.max_context == 8192
    assert len(metadata.tokens) == 49152
    assert metadata.special_token("bos") == "<|im_start|>"
    assert metadata.special_token("eos") == "<|im_end|>"
    assert "<|im_start|>" in (metadata.text("tokenizer.chat_template") or "")
    # 30 layers, 3 key-value heads of 64 numbers, for keys and for values
    assert metadata.num_cached_values_per_token == 30 * 3 * 64 * 2


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 5000])
def test_a_cut_file_is_damaged(tmp_path: Path, num_bytes: int) -> None:
    with TINY.file.locate().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(num_bytes))
    with pytest.raises(ModelDamaged, match=r"cut\.gguf.*again"):
        read_gguf_metadata(tmp_path / "cut.gguf")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"GGUF" + b"\xff" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_another_files_bytes_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelDamaged):
        read_gguf_metadata(tmp_path / "x.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match="does not exist"):
        read_gguf_metadata(tmp_path / "none.gguf")
