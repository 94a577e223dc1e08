"""The embedding model on a GPU: taken by itself where there is one, and close to float32 on the processor."""

import pytest

from cluster.engines.embedding_choice import open_embedding
from cluster.engines.embedding_torch import TorchEmbedding
from cluster.home import open_home
from cluster.weights.prepare import prepare
from tests.cluster.test_embedding import read_questions

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.requires("gpu", "vllm")]


def test_a_gpu_is_taken_and_its_vectors_are_close_to_float32_in_five_languages() -> None:
    home = open_home()
    opened = open_embedding("embed", home, threads=4)
    assert opened.engine.backend == "torch-bf16-cuda"
    assert opened.reason == "a GPU is there"
    assert opened.probe["torch-bf16-cuda"] > 0
    ids = [item.token_ids for item in opened.tokenizer.encode(read_questions())]
    exact = TorchEmbedding(prepare("embed", "hf", home), threads=4, precision="fp32").embed(ids)
    assert (exact * opened.engine.embed(ids)).sum(axis=1).min() >= 0.99
    on_gpu = TorchEmbedding(prepare("embed", "hf", home), threads=4, precision="fp32", device="cuda").embed(ids)
    assert (exact * on_gpu).sum(axis=1).min() >= 0.9999
