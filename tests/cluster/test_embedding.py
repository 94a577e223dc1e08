"""Embedding engines: the same vectors whatever computes them, cut where the model ends, chosen for a reason."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.catalogue import resolve
from cluster.engines.embedding import EmbeddingEngine, EmbeddingSpec, normalise, read_embedding_spec
from cluster.engines.embedding_choice import (
    Candidate,
    OpenedEmbedding,
    _fastest,
    cpu_flags,
    list_candidates,
    open_embedding,
    probe_speed,
)
from cluster.engines.embedding_llamacpp import LlamaCppEmbedding
from cluster.engines.embedding_text import EmbeddingTokenizer
from cluster.errors import EngineDead, InvalidRequest, ModelDamaged, ModelNotFound
from cluster.home import Home, open_home
from cluster.weights.e5_check import check_vectors, read_known_vectors
from cluster.weights.prepare import prepare

QUESTIONS = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"
BF16 = frozenset({"avx2", "avx512_bf16"})
AVX2 = frozenset({"avx2"})
TEXTS = read_known_vectors().texts


@pytest.fixture(scope="module")
def home() -> Home:
    return open_home()


@pytest.fixture(scope="module")
def opened(home: Home) -> Iterator[OpenedEmbedding]:
    model = open_embedding("embed", home, precision="gguf", threads=1)
    yield model
    model.engine.close()


def known_ids(opened: OpenedEmbedding) -> list[list[int]]:
    return [item.token_ids for item in opened.tokenizer.encode(TEXTS)]


def test_llamacpp_computes_the_known_vectors(opened: OpenedEmbedding) -> None:
    vectors = opened.engine.embed(known_ids(opened))
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert check_vectors(vectors, "llama.cpp") > 0.999


def test_order_and_company_of_texts_do_not_change_their_vectors(opened: OpenedEmbedding) -> None:
    ids = known_ids(opened)
    together = opened.engine.embed(ids)
    alone = np.concatenate([opened.engine.embed([one]) for one in ids])
    backwards = opened.engine.embed(ids[::-1])[::-1]
    assert ((together * alone).sum(axis=1) > 0.9999).all()
    assert ((together * backwards).sum(axis=1) > 0.9999).all()


def test_no_texts_give_no_rows(opened: OpenedEmbedding) -> None:
    assert opened.engine.embed([]).shape == (0, 384)


def test_many_long_texts_fit_into_one_call(opened: OpenedEmbedding) -> None:
    ids = [[0, *range(1000 + row, 1510 + row), 2] for row in range(3)]
    assert opened.engine.embed(ids).shape == (3, 384)


def test_a_closed_engine_says_that_it_is_dead(home: Home) -> None:
    engine = LlamaCppEmbedding(prepare("embed", "gguf", home), threads=1, max_tokens=512)
    engine.close()
    engine.close()
    with pytest.raises(EngineDead):
        engine.embed([[0, 2]])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ModelDamaged, match="cannot load"):
        LlamaCppEmbedding(path, threads=1, max_tokens=512)


def read_questions() -> list[str]:
    texts = []
    for language in ("en", "de", "es", "fr", "it"):
        lines = (QUESTIONS / language / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:16]
        texts += ["query: " + json.loads(line)["text"] for line in lines]
    return texts


@pytest.mark.integration
@pytest.mark.requires("vllm")
@pytest.mark.parametrize("precision", ["bf16", "gguf", "int8"])
def test_reduced_precision_stays_close_to_float32_in_five_languages(
    home: Home, opened: OpenedEmbedding, precision: str
) -> None:
    from cluster.engines.embedding_torch import TorchEmbedding

    folder = prepare("embed", "hf", home)
    texts = read_questions()[::8] if precision == "bf16" else read_questions()  # bf16 is emulated on old processors
    ids = [item.token_ids for item in opened.tokenizer.encode(texts)]
    exact = TorchEmbedding(folder, threads=1, precision="fp32").embed(ids)
    engine: EmbeddingEngine = opened.engine
    if precision == "bf16":
        engine = TorchEmbedding(folder, threads=1, precision="bf16")
    if precision == "int8":
        engine = TorchEmbedding(folder, threads=1, precision="fp32")
        engine.quantize()
        alone = np.concatenate([engine.embed([one]) for one in ids[:10]])
        # Not closer: what differs by a rounding error may fall on either side of a step of int8.
        assert ((alone * engine.embed(ids)[:10]).sum(axis=1) > 0.995).all(), "a vector depends on its company"
    cosines = (exact * engine.embed(ids)).sum(axis=1)
    assert cosines.min() >= 0.99
    assert (
        check_vectors(TorchEmbedding(folder, threads=1, precision="fp32").embed(known_ids(opened)), "PyTorch") > 0.999
    )


def test_text_is_cut_at_the_limit_and_says_so(opened: OpenedEmbedding) -> None:
    short, exact, long, huge = opened.tokenizer.encode(
        ["word", "word " * 510, "word " * 511, "word " * 2_000_000], prefix=""
    )
    assert (short.is_truncated, exact.is_truncated, long.is_truncated, huge.is_truncated) == (False, False, True, True)
    assert (len(exact.token_ids), len(long.token_ids), len(huge.token_ids)) == (512, 512, 512)
    assert (long.token_ids[0], long.token_ids[-1]) == (0, 2)


def test_the_prefix_counts_and_survives_the_cut(opened: OpenedEmbedding) -> None:
    prefix = opened.spec.prefixes["query"]
    assert prefix == "query: "
    plain, prefixed = (opened.tokenizer.encode(["word " * 600], given)[0] for given in ("", prefix))
    assert len(prefixed.token_ids) == len(plain.token_ids) == 512
    assert prefixed.token_ids[:4] == opened.tokenizer.encode(["query: word"])[0].token_ids[:4]


def test_foreign_token_ids_are_refused(opened: OpenedEmbedding) -> None:
    with pytest.raises(InvalidRequest, match=r"between 0 and 250001; send text"):
        opened.tokenizer.accept_ids([[0, 900_000, 2]])
    with pytest.raises(InvalidRequest, match="empty list"):
        opened.tokenizer.accept_ids([[]])
    assert opened.tokenizer.accept_ids([[5] * 600])[0].is_truncated


def test_the_processor_tells_what_it_can() -> None:
    assert isinstance(cpu_flags(), frozenset)


def names(source: str, precision: str, flags: frozenset[str], *, has_torch: bool = True, has_gpu: bool = False):
    candidates, _ = list_candidates(resolve(source), precision, flags, has_torch=has_torch, has_gpu=has_gpu)  # type: ignore[arg-type]
    return [(candidate.name, candidate.device) for candidate in candidates]


def test_bf16_is_tried_only_where_the_processor_computes_it() -> None:
    assert names("embed", "auto", AVX2) == [("llamacpp", "cpu")]
    for flag in ("avx512_bf16", "amx_bf16"):
        assert names("embed", "auto", AVX2 | {flag}) == [("llamacpp", "cpu"), ("torch-bf16", "cpu")]
    assert names("embed", "auto", BF16, has_torch=False) == [("llamacpp", "cpu")]
    assert names("embed", "auto", AVX2, has_gpu=True) == [("torch-bf16", "cuda")]


def test_a_named_precision_is_taken_or_refused(tmp_path: Path) -> None:
    assert names("embed", "fp32", AVX2) == [("torch-fp32", "cpu")]
    assert names("embed", "bf16", AVX2) == [("torch-bf16", "cpu")]
    with pytest.raises(ModelNotFound, match="precision bf16 here"):
        names("embed", "bf16", BF16, has_torch=False)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert names(str(tmp_path), "auto", AVX2) == [("torch-int8", "cpu"), ("torch-fp32", "cpu")]
    assert names(str(tmp_path), "auto", BF16) == [("torch-bf16", "cpu")]
    with pytest.raises(ModelNotFound, match="gguf needs a"):
        names(str(tmp_path), "gguf", AVX2)


@pytest.mark.integration
@pytest.mark.requires("vllm")
def test_a_checkpoint_without_gguf_runs_in_int8_where_its_vectors_stay_the_same(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.engines.embedding_choice.cpu_flags", lambda: AVX2)
    folder = str(prepare("embed", "hf", home))
    model = open_embedding(folder, home, precision="auto", threads=1)
    model.engine.close()
    assert set(model.probe) == {"torch-int8", "torch-fp32"}
    named = open_embedding(folder, home, precision="int8", threads=1)
    assert named.engine.backend == "torch-int8"
    assert check_vectors(named.engine.embed([t.token_ids for t in named.tokenizer.encode(TEXTS)]), "int8") >= 0.99
    named.engine.close()

    monkeypatch.setattr("cluster.engines.embedding_choice._MIN_COSINE", 1.1)
    exact = open_embedding(folder, home, precision="auto", threads=1)
    exact.engine.close()
    assert exact.engine.backend == "torch-fp32"
    assert "slow" in exact.reason
    assert "a .gguf file" in exact.reason
    with pytest.raises(ModelNotFound, match=r"in int8 its vectors stray .*precision: auto"):
        open_embedding(folder, home, precision="int8", threads=1)


class TimedEngine:
    """An engine that takes a fixed number of turns of pure Python: slow and fast without a clock."""

    dimension = 4

    def __init__(self, backend: str, num_turns: int) -> None:
        self.backend = backend
        self.is_closed = False
        self.num_calls = 0
        self._num_turns = num_turns

    def embed(self, token_ids):
        self.num_calls += 1
        sum(range(self._num_turns))
        return np.ones((len(token_ids), 4), dtype=np.float32) / 2

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_probe_keeps_the_fastest_and_frees_the_others(order: tuple[int, int]) -> None:
    engines = [TimedEngine("fast", 10), TimedEngine("slow", 3_000_000)]
    openers = [lambda engine=engines[index]: (engine, Path(), EmbeddingSpec()) for index in order]
    (chosen, _, _), speeds = _fastest(openers)
    assert chosen.backend == "fast"
    assert speeds["fast"] > speeds["slow"]
    assert [engine.is_closed for engine in engines] == [False, True]


def test_a_single_backend_is_timed_too(opened: OpenedEmbedding) -> None:
    assert set(opened.probe) == {opened.engine.backend}
    assert opened.probe[opened.engine.backend] > 0


def test_a_slow_engine_is_timed_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.engines.embedding_choice._PROBE_BUDGET_S", 0.0)
    engine = TimedEngine("slow", 10)
    assert probe_speed(engine) > 0
    assert engine.num_calls == 2, "one round to warm up, one that counts"


def test_the_choice_says_why(opened: OpenedEmbedding) -> None:
    assert "precision: gguf" in opened.reason
    assert opened.identity.startswith("intfloat/multilingual-e5-small@")


def test_the_files_beside_a_checkpoint_say_how_it_is_used(tmp_path: Path) -> None:
    assert read_embedding_spec(tmp_path) == EmbeddingSpec(512, "mean", {})
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Q: ", "document": "D: "}}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 256}')
    spec = read_embedding_spec(tmp_path)
    assert (spec.max_tokens, spec.pooling, spec.prefixes["passage"]) == (256, "cls", "D: ")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelDamaged, match="not valid JSON"):
        read_embedding_spec(tmp_path)


def test_a_tokenizer_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match=r"tokenizer\.json is missing"):
        EmbeddingTokenizer(tmp_path, EmbeddingSpec())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelDamaged, match="cannot be read"):
        EmbeddingTokenizer(tmp_path, EmbeddingSpec())


def test_vectors_without_direction_are_an_error() -> None:
    with pytest.raises(ModelDamaged, match="without direction"):
        normalise(np.zeros((1, 4), dtype=np.float32))
    with pytest.raises(ModelDamaged):
        normalise(np.full((1, 4), np.nan, dtype=np.float32))


def test_a_candidate_names_its_files() -> None:
    assert Candidate("llamacpp", "gguf", "gguf").format == "gguf"
