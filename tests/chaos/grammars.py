"""Trials of answers that are bound to a JSON schema on vLLM, while the replica that has more of them is killed: every
one that goes on elsewhere has to end by itself, to parse, and to satisfy its schema.

    python -m tests.chaos.grammars --trials 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import jsonschema

from services.relay import ModelPool
from tests.chaos.engines import SUBJECTS, Answer, Replicas, generate, replicas_of, tokenize

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


async def run_trial(replicas: Replicas, pool: ModelPool, seed: int) -> tuple[int, list[str]]:
    """How many answers went on elsewhere, and what is wrong with any."""
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
    replicas.kill(max(replicas.processes, key=lambda process: running.get(process.replica_id, 0)))
    ended = await asyncio.gather(*asked, return_exceptions=True)
    wrong = [f"{error!r}" for error in ended if isinstance(error, BaseException)]
    wrong += [why for answer in answers if not wrong and (why := why_invalid(answer))]
    replicas.start()
    await replicas.until_ready()
    return sum(answer.seam is not None for answer in answers), wrong


def why_invalid(answer: Answer) -> str | None:
    assert answer.end is not None
    if answer.end["finish_reason"] != "stop":
        return f"it ended by {answer.end['finish_reason']}: {answer.text!r}"
    try:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{answer.text!r}: {error}"
    return None


async def campaign(num_trials: int) -> tuple[int, int]:
    """Trials that passed and that failed."""
    num_passed = total_moved = 0
    async with replicas_of("vllm") as (replicas, pool):
        for number in range(num_trials):
            num_moved, wrong = await run_trial(replicas, pool, seed=number)
            if not num_moved:
                wrong.append("no answer went on elsewhere")
            num_passed, total_moved = num_passed + (not wrong), total_moved + num_moved
            print(f"grammar, trial {number + 1}: {num_moved} moved, {wrong}", flush=True)
    print(f"{total_moved} answers that are bound to a schema went on elsewhere", flush=True)
    return num_passed, num_trials - num_passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    num_passed, num_failed = asyncio.run(campaign(parser.parse_args().trials))
    print(f"{num_passed} passed, {num_failed} failed")


if __name__ == "__main__":
    main()
