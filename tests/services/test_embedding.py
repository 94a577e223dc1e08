"""The embedding service: right prefixes, shared batches, questions first, and a health check that notices death."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from cluster.engines.embedding_choice import OpenedEmbedding, open_embedding
from cluster.errors import EngineDead, EngineFailed, InvalidRequest
from cluster.home import open_home
from services.config import EmbeddingConfig, Environment
from services.embedding_batcher import MAX_BATCH_TOKENS, EmbeddingBatcher
from services.embedding_service import EmbeddingService, open_configured_embedding


@pytest.fixture(scope="module")
def model() -> Iterator[OpenedEmbedding]:
    environment = Environment(home=open_home().root, database_url="sqlite://", internal_secret="s")
    yield open_configured_embedding(EmbeddingConfig(threads=1, precision="gguf"), environment)


@pytest_asyncio.fixture
async def service(model: OpenedEmbedding) -> AsyncIterator[EmbeddingService]:
    service = EmbeddingService(model)
    await service.start()
    yield service
    # The model is shared by all tests of this file: only the batcher's task ends here.
    assert service._batcher._worker is not None
    service._batcher._worker.cancel()


async def test_questions_and_passages_get_their_own_prefix(service: EmbeddingService) -> None:
    query = await service.embed(["Wind"], "query")
    passage = await service.embed(["Wind"], "passage")
    by_hand = await service.embed(["query: Wind", "passage: Wind"], "raw")
    assert np.allclose(query.vectors[0], by_hand.vectors[0], atol=1e-3)
    assert np.allclose(passage.vectors[0], by_hand.vectors[1], atol=1e-3)
    assert float(query.vectors[0] @ passage.vectors[0]) < 0.999


async def test_an_answer_is_nearer_to_its_question_than_other_text_across_languages(service: EmbeddingService) -> None:
    question = await service.embed_queries(["Wie hoch ist der Eiffelturm?"])
    passages = await service.embed_passages(
        ["La tour Eiffel mesure 330 mètres.", "Bread is baked from flour and water.", "The office opens at nine."]
    )
    assert int((passages @ question[0]).argmax()) == 0


async def test_no_text_empty_text_and_far_too_long_text_all_get_an_answer(service: EmbeddingService) -> None:
    nothing = await service.embed([], "query")
    assert (nothing.vectors.shape, nothing.num_tokens, nothing.truncated) == ((0, 384), [], [])
    result = await service.embed(["", "x " * 5000, "fine"], "passage")
    assert result.truncated == [False, True, False]
    assert result.num_tokens[1] == 512
    assert result.num_tokens[0] < result.num_tokens[2] < 10
    assert np.allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)
    assert result.vectors.dtype == np.float32


async def test_token_ids_give_the_vector_of_their_text(service: EmbeddingService, model: OpenedEmbedding) -> None:
    text = "A sentence about turbines."
    ids = model.tokenizer.encode([text])[0].token_ids
    by_text, by_ids = await service.embed([text]), await service.embed_token_ids([ids])
    assert np.allclose(by_text.vectors, by_ids.vectors, atol=1e-3)
    with pytest.raises(InvalidRequest, match="another model's tokenizer"):
        await service.embed_token_ids([[999_999]])


async def test_an_unknown_kind_is_refused(service: EmbeddingService) -> None:
    with pytest.raises(InvalidRequest, match="Unknown kind 'document'"):
        await service.embed(["x"], "document")  # type: ignore[arg-type]


async def test_concurrent_requests_each_get_their_own_vectors(service: EmbeddingService) -> None:
    texts = [f"Sentence number {number} speaks of {number} turbines." for number in range(24)]
    results = await asyncio.gather(*(service.embed([text], "passage") for text in texts))
    together = await service.embed(texts, "passage")
    cosines = [float(one.vectors[0] @ row) for one, row in zip(results, together.vectors, strict=True)]
    assert min(cosines) > 0.999
    assert [result.num_tokens[0] for result in results] == together.num_tokens


async def test_the_event_loop_stays_free_while_vectors_are_computed(service: EmbeddingService) -> None:
    work = asyncio.create_task(service.embed(["turbine " * 400] * 4, "passage"))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 5


async def test_the_description_names_model_backend_and_reason(service: EmbeddingService) -> None:
    described = await service.describe()
    assert described["model"] == service.model_name
    assert (described["dimension"], described["max_tokens"]) == (384, 512)
    assert described["backend"] == "llamacpp-gguf"
    assert described["reason"]
    assert described["probe_texts_per_s"]["llamacpp-gguf"] > 0
    assert Path(described["tokenizer_file"]).is_file()


async def test_a_closed_service_is_not_healthy(tmp_path: Path) -> None:
    service = EmbeddingService(open_embedding("embed", open_home(), precision="gguf", threads=1))
    await service.start()
    await service.check_health()
    await service.close()
    await service.close()
    with pytest.raises(EngineDead):
        await service.check_health()
    with pytest.raises(EngineDead):
        await service.embed(["x"])


class ScriptedEngine:
    """Keeps what it was given; waits for `gate`; fails as told. A real model does none of this on demand."""

    backend = "scripted"
    dimension = 2

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: Exception | None = None

    def embed(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        self.begun.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.batches.append([ids[0] for ids in token_ids])
        return np.array([[ids[0], len(ids)] for ids in token_ids], dtype=np.float32)

    def close(self) -> None:
        pass


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[tuple[ScriptedEngine, EmbeddingBatcher]]:
    engine = ScriptedEngine()
    batcher = EmbeddingBatcher(engine, max_batch=4, batch_wait_s=0.02)
    batcher.start()
    yield engine, batcher
    engine.gate.set()
    await batcher.close()


async def test_texts_that_arrive_together_share_a_batch(scripted: tuple[ScriptedEngine, EmbeddingBatcher]) -> None:
    engine, batcher = scripted
    rows = await asyncio.gather(*(batcher.embed([[number]], is_urgent=True) for number in (1, 2, 3)))
    assert engine.batches == [[1, 2, 3]]
    assert [row[0, 0] for row in rows] == [1, 2, 3]


async def test_batches_keep_the_limits_of_number_and_tokens(scripted: tuple[ScriptedEngine, EmbeddingBatcher]) -> None:
    engine, batcher = scripted
    await batcher.embed([[number] for number in range(6)], is_urgent=False)
    assert [len(batch) for batch in engine.batches] == [4, 2]
    engine.batches.clear()
    await batcher.embed([[7] * (MAX_BATCH_TOKENS // 2)] * 3, is_urgent=False)
    assert [len(batch) for batch in engine.batches] == [2, 1]


async def test_rows_come_back_in_order_although_texts_are_sorted_by_length(
    scripted: tuple[ScriptedEngine, EmbeddingBatcher],
) -> None:
    engine, batcher = scripted
    rows = await batcher.embed([[1] * 5, [2], [3] * 3], is_urgent=False)
    assert rows[:, 0].tolist() == [1, 2, 3]
    assert engine.batches == [[2, 3, 1]]


async def begin_long_work(engine: ScriptedEngine, batcher: EmbeddingBatcher) -> "asyncio.Task[np.ndarray]":
    """Documents 100 to 111 are in work: the first batch stands still in the engine."""
    engine.gate.clear()
    bulk = asyncio.create_task(batcher.embed([[100 + number] for number in range(12)], is_urgent=False))
    await asyncio.to_thread(engine.begun.wait, 10)
    return bulk


async def test_a_question_waits_for_one_batch_of_documents_only(
    scripted: tuple[ScriptedEngine, EmbeddingBatcher],
) -> None:
    engine, batcher = scripted
    bulk = await begin_long_work(engine, batcher)
    questions = [asyncio.create_task(batcher.embed([[number] for number in range(5)], is_urgent=True))]
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.gather(bulk, *questions)
    kinds = ["documents" if batch[0] >= 100 else "questions" for batch in engine.batches]
    assert kinds == ["documents", "questions", "documents", "questions", "documents"]


async def test_work_of_a_caller_who_left_is_not_done(scripted: tuple[ScriptedEngine, EmbeddingBatcher]) -> None:
    engine, batcher = scripted
    bulk = await begin_long_work(engine, batcher)
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)
    engine.gate.set()
    await batcher.embed([[1]], is_urgent=True)
    assert engine.batches == [[100, 101, 102, 103], [1]]


async def test_a_failed_batch_fails_its_callers_and_the_next_one_works(
    scripted: tuple[ScriptedEngine, EmbeddingBatcher],
) -> None:
    engine, batcher = scripted
    engine.error = EngineFailed("one bad batch")
    with pytest.raises(EngineFailed, match="one bad batch"):
        await batcher.embed([[1]], is_urgent=True)
    engine.error = None
    assert (await batcher.embed([[1]], is_urgent=True)).shape == (1, 2)


async def test_a_dead_engine_fails_everybody_at_once_and_for_good(
    scripted: tuple[ScriptedEngine, EmbeddingBatcher],
) -> None:
    engine, batcher = scripted
    engine.error = EngineDead("gone")
    bulk = await begin_long_work(engine, batcher)
    question = asyncio.create_task(batcher.embed([[1]], is_urgent=True))
    await asyncio.sleep(0)
    engine.gate.set()
    for task in (bulk, question):
        with pytest.raises(EngineDead, match="gone"):
            await task
    engine.error = None
    with pytest.raises(EngineDead, match="gone"):
        batcher.check()


async def test_closing_ends_those_who_wait(scripted: tuple[ScriptedEngine, EmbeddingBatcher]) -> None:
    engine, batcher = scripted
    bulk = await begin_long_work(engine, batcher)
    engine.gate.set()
    await batcher.close()
    with pytest.raises(EngineDead):
        await bulk
