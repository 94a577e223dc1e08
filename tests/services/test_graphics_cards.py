"""Of a machine's GPUs those count that CUDA_VISIBLE_DEVICES leaves to this process."""

from pathlib import Path

import pytest

from cluster.engines.choice import Hardware
from cluster.errors import TopologyError
from services import resources
from services.graphics_cards import read_cards
from services.resources import count_gpus

LISTED = "NVIDIA H100, 80000, GPU-a1\nNVIDIA L4, 24000, GPU-b2\nNVIDIA T4, 16000, GPU-b3\n"


@pytest.fixture
def three_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the driver's tool, and its device files."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{LISTED}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (devices / name).touch()
    monkeypatch.setattr(resources, "detect_hardware", lambda: Hardware(has_gpu=True, has_vllm=True))
    monkeypatch.setattr(resources, "DEVICES", devices)


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100", "NVIDIA L4", "NVIDIA T4"]),
        ("1", ["NVIDIA L4"]),
        ("2, 0", ["NVIDIA T4", "NVIDIA H100"]),
        ("GPU-b3,GPU-a", ["NVIDIA T4", "NVIDIA H100"]),
        ("1,-1,0", ["NVIDIA L4"]),
        ("0,7,1", ["NVIDIA H100"]),
    ],
)
def test_the_visible_cards_are_counted_and_read(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == len(names)
    assert [card.kind for card in read_cards(count_gpus())] == names


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize("entry", ["GPU-c", "GPU-b", "MIG-a1"])
def test_a_card_that_the_driver_does_not_list_or_lists_twice_is_an_error(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", entry)
    with pytest.raises(TopologyError, match=f"names {entry}, which is not one card of nvidia-smi"):
        read_cards(1)
