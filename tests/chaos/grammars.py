"""Trials of answers that are bound to a JSON schema on vLLM, while the replica that has more of them is killed: every
one that goes on elsewhere has to end by itself, to parse, and to satisfy its schema.

    python -m tests.chaos.grammars --trials 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema

from services.relay import ModelPool
from tests.chaos.engines import SUBJECTS, Answer, Replicas, generate, replicas_of, tokenize
from tests.chaos.faults import Fault, LossWatch, Outcome

NUM_TOKENS = 250
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["fable", "report", "letter"]},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2999},
        "people": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
        "is_true": {"type": "boolean"},
    },
    "required": ["title", "kind", "year", "people", "is_true"],
    "additionalProperties": False,
}


def faults(_quick: bool) -> list[Fault]:
    return [Fault("grammar-bound stream loses its replica", 10, None, campaign, needs="vllm")]


async def run_trial(replicas: Replicas, pool: ModelPool, seed: int) -> Outcome:
    """One of the replicas is killed and another one started. The time is the longest silence of a moved answer."""
    prompts = [await tokenize(replicas, f"Describe a book on {subject} as JSON:") for subject in SUBJECTS]
    answers = [Answer() for _ in prompts]
    sampling = {"json_schema": SCHEMA, "ignore_eos": False, "temperature": 1.0, "seed": seed}
    asked = [
        asyncio.create_task(generate(pool, prompt, NUM_TOKENS, answer, **sampling))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    while not all(len(answer.token_ids) >= 5 for answer in answers) and not any(task.done() for task in asked):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    running = {replica.replica_id: replica.running for replica in replicas.directory.replicas("tiny")}
    watch, fault_at = LossWatch(replicas.directory), time.monotonic()
    replicas.kill(max(replicas.processes, key=lambda process: running.get(process.replica_id, 0)))
    ended = await asyncio.gather(*asked, return_exceptions=True)
    replicas.start()
    await replicas.until_ready()
    errors = [f"{error!r}" for error in ended if isinstance(error, BaseException)]
    return replace(judge(answers, errors), noticed_s=watch.seconds_after(fault_at))


def judge(answers: Sequence[Answer], errors: Sequence[str]) -> Outcome:
    """A trial in which no answer moved shows nothing."""
    moved = [answer for answer in answers if answer.seam is not None]
    wrong = list(errors) or [why for answer in answers if (why := why_invalid(answer))]
    if not moved:
        wrong.append("no answer went on elsewhere")
    seconds = max((answer.gap_s for answer in moved), default=float("nan"))
    return Outcome(seconds, f"whole answers, of which {len(moved)} went on elsewhere", "; ".join(wrong[:2]) or None)


def why_invalid(answer: Answer) -> str | None:
    assert answer.end is not None
    if answer.end["finish_reason"] != "stop":
        return f"it ended by {answer.end['finish_reason']}: {answer.text!r}"
    try:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{answer.text!r}: {error}"
    return None


async def campaign(num_trials: int) -> list[Outcome]:
    outcomes = []
    async with replicas_of("vllm") as (replicas, pool):
        for number in range(num_trials):
            outcomes.append(outcome := await run_trial(replicas, pool, seed=number))
            print(f"grammar, trial {number + 1}: {outcome}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    outcomes = asyncio.run(campaign(parser.parse_args().trials))
    num_failed = sum(outcome.problem is not None for outcome in outcomes)
    print(f"{len(outcomes) - num_failed} passed, {num_failed} failed")


if __name__ == "__main__":
    main()
