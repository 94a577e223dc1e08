"""What every engine must do, run on each of them with the model that comes along."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.engine import Delivered, Engine, GenerationChunk, GenerationRequest, SamplingParams
from cluster.errors import CannotContinue, ContextTooLong, EngineBusy, EngineDead, EngineFailed, InvalidRequest
from services.resources import count_gpus
from tests.chaos.replicas import PausingEngine, kill_the_paused
from tests.chaos.streams import read_events
from tests.cluster.engines.conftest import MAX_CONTEXT, MAX_QUEUED, NUM_SLOTS, chat, text_prompt
from tests.services.harness import running_endpoint

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

COUNTING = "Count: one two three four five"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "number": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["colour", "number"],
    "additionalProperties": False,
}
BEST_LOGIT_DISTANCE = 0.05
"""Natural logarithm: how far a token after the seam may be from the best one. The prompt of a continued answer is
computed in other batches than the answer was, in half precision or with quantized weights."""
MIXED_BYTES = 'root ::= "a" "😀é" "漢字" "b"'


async def collect(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


async def test_a_greedy_answer_repeats_and_only_its_last_chunk_ends_it(engine: Engine) -> None:
    first = await collect(engine, chat("Say hello.", temperature=0))
    second = await collect(engine, chat("Say hello.", temperature=0))
    assert text_of(first) == text_of(second) != ""
    assert [chunk.finish_reason for chunk in first[:-1]] == [None] * (len(first) - 1)
    assert first[-1].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in first[:-1])


async def test_the_answer_ends_at_its_limit_and_every_token_is_counted(engine: Engine) -> None:
    chunks = await collect(engine, chat("Tell a story.", temperature=0, max_tokens=9))
    last = chunks[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.num_completion_tokens == 9
    assert last.usage.num_prompt_tokens > 5
    assert len(ids_of(chunks)) == (9 if engine.info.gives_token_ids else 0)


async def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_shown(engine: Engine) -> None:
    chunks = await collect(engine, text_prompt(COUNTING, temperature=0, stop=("seven eig", "nonsense")))
    assert chunks[-1].finish_reason == "stop"
    assert text_of(chunks) == " six "


async def test_text_that_only_began_like_a_stop_string_is_shown_in_the_end(engine: Engine) -> None:
    chunks = await collect(engine, text_prompt(COUNTING, temperature=0, max_tokens=2, stop=("seven ate",)))
    assert chunks[-1].finish_reason == "length"
    assert text_of(chunks) == " six seven"


async def test_a_seed_repeats_an_answer_and_another_seed_changes_it(engine: Engine) -> None:
    answers = [text_of(await collect(engine, text_prompt("A poem:", temperature=1.0, seed=seed))) for seed in (7, 7, 8)]
    assert answers[0] == answers[1] != answers[2]


async def test_log_probabilities_come_with_the_alternatives_best_first(engine: Engine) -> None:
    chunks = await collect(engine, chat("Say hello.", temperature=0, max_tokens=3, logprobs=2))
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert len(entries) == 3
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top) == 2
        assert entry.top[0][1] >= entry.top[1][1]
        assert entry.top[0] == (entry.token, pytest.approx(entry.logprob))
    assert "".join(entry.token for entry in entries) == text_of(chunks)


async def test_no_alternatives_means_only_the_chosen_tokens_own(engine: Engine) -> None:
    chunks = await collect(engine, chat("Say hello.", temperature=0, max_tokens=2, logprobs=0))
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert len(entries) == 2
    assert all(entry.top == () for entry in entries)
    assert all(chunk.logprobs is None for chunk in await collect(engine, chat("Say hello.", max_tokens=2)))


async def test_a_json_schema_binds_the_answer(engine: Engine) -> None:
    chunks = await collect(engine, chat("Pick a colour.", temperature=1.0, seed=1, max_tokens=40, json_schema=SCHEMA))
    answer = json.loads(text_of(chunks))
    assert chunks[-1].finish_reason == "stop"
    assert answer["colour"] in ("red", "blue")
    assert 0 <= answer["number"] <= 9


async def test_a_schema_that_cannot_bind_is_refused_with_its_fault(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="nonsense"):
        await collect(engine, chat("Hello.", json_schema={"type": "nonsense"}))


async def test_a_grammar_binds_the_answer_and_characters_are_never_cut(engine: Engine) -> None:
    request = text_prompt("Signs:", temperature=0, max_tokens=40, grammar=MIXED_BYTES)
    if not engine.info.takes_grammar:
        with pytest.raises(InvalidRequest, match="grammar"):
            await collect(engine, request)
        return
    chunks = await collect(engine, request)
    assert text_of(chunks) == "a😀é漢字b"
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    last = chunks[-1]
    assert last.usage is not None
    assert len(ids_of(chunks)) == last.usage.num_completion_tokens, "also the tokens of cut characters are told"


async def test_an_answer_that_ends_inside_a_character_shows_no_part_of_it(engine: Engine) -> None:
    if engine.info.takes_grammar:
        chunks = await collect(engine, text_prompt("Signs:", temperature=0, max_tokens=3, grammar=MIXED_BYTES))
        assert text_of(chunks) == "a"


async def test_a_broken_grammar_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest):
        await collect(engine, text_prompt("Hello", grammar="root ::= ("))


async def test_token_ids_continue_an_answer_exactly(engine: Engine) -> None:
    """What a stream that moves to another replica needs."""
    if not engine.info.gives_token_ids:
        pytest.xfail("remote APIs tell no token ids")
    whole = await collect(engine, text_prompt(COUNTING, temperature=0, max_tokens=8))
    prompt_ids = await engine.tokenize(COUNTING)
    resumed = GenerationRequest(
        "r", prompt_token_ids=prompt_ids + ids_of(whole)[:4], sampling=SamplingParams(temperature=0, max_tokens=4)
    )
    assert ids_of(await collect(engine, resumed)) == ids_of(whole)[4:]


async def test_a_forbidden_token_does_not_appear(engine: Engine) -> None:
    plain = await collect(engine, text_prompt(COUNTING, temperature=0, max_tokens=1))
    biased = text_prompt(COUNTING, temperature=0, max_tokens=4, logit_bias={2976: -100})  # " six"
    assert text_of(plain) == " six"
    assert " six" not in text_of(await collect(engine, biased))


async def test_prompts_are_counted_exactly_as_they_are_used(engine: Engine) -> None:
    for request in (chat("Grüße, 漢字!"), text_prompt("plain <|im_end|> text")):
        counted = await engine.count_prompt_tokens(request)
        usage = (await collect(engine, request))[-1].usage
        assert usage is not None
        if engine.info.gives_token_ids:
            assert counted == usage.num_prompt_tokens
        else:
            assert counted >= usage.num_prompt_tokens / 4, "an estimate"


async def test_what_exceeds_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    limit = engine.info.max_context
    with pytest.raises(ContextTooLong, match=rf"{limit + 1}.* {limit} tokens"):
        await collect(engine, text_prompt("Hello", max_tokens=limit + 1))
    with pytest.raises(ContextTooLong, match=rf"prompt has \d+ tokens.* {limit} tokens"):
        await collect(engine, text_prompt("word " * limit, max_tokens=1))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"logprobs": 99},
        {"stop": ("",)},
        {"logit_bias": {1: 500.0}},
        {"logit_bias": {10_000_000: 1.0}},
        {"json_schema": {}, "grammar": "root ::= [a]"},
    ],
)
async def test_bad_parameters_are_refused_before_anything_runs(engine: Engine, sampling: dict) -> None:
    if engine.info.engine == "remote" and 10_000_000 in sampling.get("logit_bias", {}):
        sampling = {"temperature": 3.0}  # only the other side knows its vocabulary; it refuses this by itself
    with pytest.raises(InvalidRequest):
        await collect(engine, text_prompt("Hello", **sampling))
    assert engine.load[:2] == (0, 0)


@pytest.mark.parametrize("prompt", [{}, {"messages": []}, {"prompt_text": ""}, {"prompt_text": "a", "messages": [1]}])
async def test_a_request_without_one_prompt_is_refused(engine: Engine, prompt: dict) -> None:
    with pytest.raises(InvalidRequest):
        await collect(engine, GenerationRequest("r", **prompt))


async def test_closing_a_stream_frees_its_slot_for_who_waits(engine: Engine) -> None:
    endless = [engine.generate(_endless()) for _ in range(NUM_SLOTS)]
    for stream in endless:
        await anext(stream)
    assert engine.load[:2] == (NUM_SLOTS, 0)
    if engine.info.engine != "remote":  # which tells nothing of its cache
        assert NUM_SLOTS * len(COUNTING.split()) < engine.load.num_tokens < engine.load.max_tokens
    waiting = asyncio.create_task(collect(engine, chat("Hello.", max_tokens=2)))
    await endless[0].aclose()
    assert (await waiting)[-1].finish_reason == "length"
    await endless[1].aclose()
    assert (await collect(engine, chat("Hello.", max_tokens=2)))[-1].finish_reason == "length"
    await _until_load(engine, 0, 0)
    assert engine.load.num_tokens == 0


async def test_who_finds_slots_and_queue_full_is_turned_away_at_once(engine: Engine) -> None:
    streams = [engine.generate(_endless()) for _ in range(NUM_SLOTS)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.create_task(collect(engine, chat("Hello.", max_tokens=1))) for _ in range(MAX_QUEUED)]
    await _until_load(engine, NUM_SLOTS, MAX_QUEUED)
    with pytest.raises(EngineBusy, match="Try again"):
        await collect(engine, chat("Hello."))
    for task in waiting:  # who waits may leave
        task.cancel()
    for stream in streams:
        await stream.aclose()
    await _until_load(engine, 0, 0)
    assert (await collect(engine, chat("Hello.", max_tokens=1)))[-1].usage is not None


async def test_slots_run_side_by_side(engine: Engine) -> None:
    answers = await asyncio.gather(*(collect(engine, chat(f"Say {n}.", temperature=0)) for n in range(NUM_SLOTS)))
    assert all(answer[-1].finish_reason for answer in answers)


@pytest.mark.requires("vllm")
async def test_a_long_prompt_of_vllm_is_computed_in_parts_and_a_short_one_beside_it(vllm: Engine) -> None:
    ended = []

    async def ask(name: str, first_id: int, num_ids: int) -> None:
        ids = list(range(first_id, first_id + num_ids))
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        chunks = await collect(vllm, GenerationRequest(name, prompt_token_ids=ids, sampling=sampling))
        ended.append((name, chunks[-1].usage))

    await asyncio.gather(ask("long", 1000, MAX_CONTEXT - 8), ask("short", 2000, 8))
    if not count_gpus():  # they take a prompt of this context at once
        assert [name for name, _ in ended] == ["short", "long"]
    ended.sort(key=lambda end: end[0] == "long")
    assert [usage.num_prompt_tokens for _, usage in ended if usage] == [8, MAX_CONTEXT - 8]


async def test_a_running_engine_is_healthy(engine: Engine) -> None:
    await engine.check_health()
    # A remote API says itself what it takes.
    assert engine.info.max_context == MAX_CONTEXT or engine.info.engine == "remote"


def _endless() -> GenerationRequest:
    """Runs to the end of the context unless it is cancelled; needs no field that remote APIs refuse."""
    return text_prompt(COUNTING, max_tokens=MAX_CONTEXT - 50, logit_bias={0: -100.0, 2: -100.0})


async def _until_load(engine: Engine, num_running: int, num_queued: int) -> None:
    async with asyncio.timeout(30):
        while engine.load[:2] != (num_running, num_queued):  # noqa: ASYNC110  # plain numbers
            await asyncio.sleep(0.01)


async def check_continuations(engine: Engine, request: GenerationRequest) -> None:
    """Take the answer up after each of its chunks, as a stream does that moves to another replica."""
    whole = await collect(engine, request)
    assert whole[-1].usage is not None
    for num_chunks in range(1, len(whole)):
        sent = whole[:num_chunks]
        delivered = Delivered(tuple(ids_of(sent)), len(text_of(sent)))
        if not delivered.token_ids:
            continue
        rest = await collect(engine, dataclasses.replace(request, delivered=delivered))
        ids = list(delivered.token_ids) + ids_of(rest)
        where = f"after {len(delivered.token_ids)} tokens"
        if ids == ids_of(whole):
            assert text_of(sent) + text_of(rest) == text_of(whole), where
            assert rest[-1].finish_reason == whole[-1].finish_reason, where
            assert rest[-1].usage is not None
            assert rest[-1].usage.num_prompt_tokens == whole[-1].usage.num_prompt_tokens, where
            assert rest[-1].usage.num_completion_tokens == whole[-1].usage.num_completion_tokens, where
            entries = [entry for chunk in (*sent, *rest) for entry in chunk.logprobs or ()]
            assert len(entries) == sum(len(chunk.logprobs or ()) for chunk in whole), where
        else:
            pairs = enumerate(zip(ids, ids_of(whole), strict=False))
            at = next((n for n, (one, other) in pairs if one != other), None)
            assert at is not None, f"{where}: {ids} {text_of(rest)!r} of {ids_of(whole)} {text_of(whole)!r}"
            entries = [entry for chunk in whole for entry in chunk.logprobs or ()]
            assert distance_to_best(entries[at].top, rest, at - len(delivered.token_ids)) <= BEST_LOGIT_DISTANCE, where


def distance_to_best(alternatives: tuple[tuple[str, float], ...], rest: list[GenerationChunk], at: int) -> float:
    """Of the token that was chosen instead, by the log-probabilities of the answer that was not cut."""
    chosen = [entry for chunk in rest for entry in chunk.logprobs or ()][at].token
    return alternatives[0][1] - next((value for token, value in alternatives if token == chosen), float("-inf"))


async def test_an_answer_goes_on_after_any_of_its_chunks(engine: Engine) -> None:
    request = chat("Tell me about the sea.", temperature=0, max_tokens=20, logprobs=5)
    if not engine.info.continues_answers:
        with pytest.raises(CannotContinue):
            await collect(engine, dataclasses.replace(request, delivered=Delivered((1,), 1)))
        return
    await check_continuations(engine, request)


async def test_a_continued_answer_ends_at_its_stop_string_and_its_end_token(engine: Engine) -> None:
    if not engine.info.continues_answers:
        return
    await check_continuations(
        engine, text_prompt(COUNTING, temperature=0, logprobs=2, stop=("seven eig", " six sevex"))
    )
    whole = text_prompt("Say: hi", temperature=0, max_tokens=60, logprobs=2, logit_bias={2: 12.0})  # its end token
    await check_continuations(engine, whole)


async def test_a_stop_string_is_found_over_the_seam(engine: Engine) -> None:
    if not engine.info.continues_answers:
        return
    request = text_prompt(COUNTING, temperature=0, stop=("seven eig",))
    token_ids = tuple(await engine.tokenize(" six seven"))
    for num_tokens in range(1, len(token_ids) + 1):
        for num_shown in (0, len(" six")):
            delivered = Delivered(token_ids[:num_tokens], num_shown)
            rest = await collect(engine, dataclasses.replace(request, delivered=delivered))
            assert text_of(rest) == " six "[num_shown:]
            assert rest[-1].finish_reason == "stop"


async def test_a_guided_answer_goes_on_where_the_grammar_was_or_is_refused(engine: Engine) -> None:
    assert engine.info.continues_guided_answers == (engine.info.engine == "vllm")
    schema = chat("Pick a colour.", temperature=1.0, seed=1, max_tokens=40, json_schema=SCHEMA)
    if not engine.info.continues_guided_answers:
        with pytest.raises(CannotContinue):
            await collect(engine, dataclasses.replace(schema, delivered=Delivered((1,), 0)))
        return
    for request in (schema, text_prompt("Signs:", temperature=0, max_tokens=40, grammar=MIXED_BYTES)):
        whole = await collect(engine, request)
        for num_chunks in range(1, len(whole)):
            sent = whole[:num_chunks]
            delivered = Delivered(tuple(ids_of(sent)), len(text_of(sent)))
            rest = await collect(engine, dataclasses.replace(request, delivered=delivered))
            assert rest[-1].finish_reason == "stop"
            if request.sampling.grammar:
                assert text_of(sent) + text_of(rest) == "a😀é漢字b"
            else:
                answer = json.loads(text_of(sent) + text_of(rest))
                assert answer["colour"] in ("red", "blue")
                assert 0 <= answer["number"] <= 9


async def test_tokens_that_break_the_grammar_cannot_be_continued(engine: Engine) -> None:
    if not engine.info.continues_guided_answers:
        return
    token_ids = tuple(await engine.tokenize("hello"))
    request = chat("Pick a colour.", max_tokens=40, json_schema=SCHEMA)
    with pytest.raises((InvalidRequest, EngineFailed)):
        await collect(engine, dataclasses.replace(request, delivered=Delivered(token_ids, 0)))


@pytest.mark.requires("vllm")
async def test_a_guided_answer_goes_on_behind_the_endpoint(vllm: Engine, tmp_path: Path) -> None:
    """Two replicas of this engine; the one that began the answer is lost in the middle of its grammar."""
    asks = {"messages": chat("Pick a colour.").messages, "temperature": 1.0, "seed": 1, "max_tokens": 40}
    asks["response_format"] = {"type": "json_schema", "json_schema": {"name": "sign", "schema": SCHEMA}}
    async with running_endpoint(tmp_path) as running:
        engines = [PausingEngine(vllm, num_chunks=3) for _ in range(2)]
        for number, engine in enumerate(engines):
            await running.add_model(engine, replica_id=f"r{number}")
        asked = asyncio.create_task(running.chat(stream=True, **asks))
        await kill_the_paused(running, engines)
        answer = await asked
    assert [len(engine.rests) for engine in engines if not engine.has_paused] == [1]
    said = read_events(answer.text)
    assert said.finish_reason == "stop"
    assert json.loads(said.text)["colour"] in ("red", "blue")


@pytest.mark.requires("vllm")
async def test_tokens_that_come_with_a_stop_string_but_behind_it_are_not_of_a_continued_answer(vllm: Engine) -> None:
    """On a busy machine vLLM hands over several tokens at once."""
    from cluster.engines.vllm_resumption import ContinuedText

    ids = await vllm.tokenize(" six seven eight nine ten")
    pieces = [await vllm.tokenize(text) for text in (" six", " seven", " eight")]
    assert ids[: sum(map(len, pieces))] == [token_id for piece in pieces for token_id in piece]
    tokenizer: Any = vllm
    text = ContinuedText(
        tokenizer._engine.get_tokenizer(),
        await vllm.tokenize("Count: one two three four five"),
        SamplingParams(stop=("seven eig",)),
        Delivered(tuple(pieces[0]), len(" six")),
        50,
        frozenset(),
    )
    shown, num_tokens = text.feed(ids[len(pieces[0]) :], ends_with_stop_token=False)
    assert (shown, num_tokens, text.has_stopped) == (" ", len(pieces[1]) + len(pieces[2]), True)


@pytest.mark.requires("vllm")
async def test_on_cpus_vllm_looks_at_a_model_without_a_process_of_its_own(
    vllm: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models import registry

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # where it remembers what it has seen
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", ["false"])
    model: Any = registry.ModelRegistry.models["MixtralForCausalLM"]
    assert model.inspect_model_cls().is_text_generation_model


@pytest.mark.requires("vllm")
async def test_a_dead_engine_process_ends_streams_and_raises_in_health_and_stopping_leaves_nothing(
    vllm: Engine,
) -> None:
    """The last one: the engine of the tests above ends here."""
    started = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("VLLM::")]
    core = next(child for child in started if child.name() == "VLLM::EngineCore")
    await vllm.check_health()
    stream = vllm.generate(chat("Tell a story.", max_tokens=300, ignore_eos=True))
    await anext(stream)
    core.kill()
    with pytest.raises(EngineDead):
        async for _ in stream:
            pass
    with pytest.raises(EngineDead):
        await vllm.check_health()
    await vllm.stop()
    await vllm.stop()
    assert [process.pid for process in started if process.is_running()] == []
    with pytest.raises(EngineDead):
        await anext(vllm.generate(chat("Hello.")))
