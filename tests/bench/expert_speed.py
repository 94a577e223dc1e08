"""Speed of spread experts: two ranks against one, placement, sparse against dense, and what counting costs."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.engines.parallelism import Parallelism
from tests.bench.expert_parts import (
    Models,
    alternate,
    install_timers,
    planned,
    questions,
    ratio,
    read_timers,
    replica,
    start_profiler,
    stop_profiler,
    tell,
    turn_counters,
)
from tests.engine_process import Replica, gang

SEQUENCES = 32
PREFILL = 768
TWO = Parallelism(2, enable_expert_parallel=True)


def throughput(running: Replica, prompts: list[list[int]], answer: int) -> float:
    """Generated tokens per second at the engine, all prompts at once."""
    return len(prompts) * answer / running.time(prompts, answer)


def exchange_share(running: Replica, prompts: list[list[int]], answer: int) -> float:
    """The share of their steps that all ranks spend exchanging, waiting for each other included."""
    running.call(read_timers)
    running.call(start_profiler)
    throughput(running, prompts, answer)
    over_memory, timed = running.call(stop_profiler), running.call(read_timers)
    over_gloo = sum(each["exchange"] for each in timed)
    return round((sum(over_memory) + over_gloo) / sum(each["step"] for each in timed), 3)


def measure_ratio(models: Models, times: int, answer: int, *, eager: bool) -> dict[str, Any]:
    """Two ranks with a core each against one rank with a core, as one engine and as a gang; bfloat16, 32 sequences.

    Experts are placed by the load that the one rank measured on other prompts; all engines count, all are compiled or
    all `eager`. The share of exchange is measured apart, before, because a profiler takes time.
    """
    prompts = questions(models.distinct, SEQUENCES)
    loads: list[list[int]] = []

    def make(parallelism: Parallelism) -> Replica:
        return replica(models.distinct, parallelism, dtype="bfloat16", enforce_eager=eager)

    def one() -> Replica:
        running = make(Parallelism(count_experts=True))
        running.generate(questions(models.distinct, SEQUENCES, skip=SEQUENCES), answer)
        loads.extend(running.loads()[0].tokens.tolist())
        return running

    def engine() -> Replica:
        return make(replace(TWO, count_experts=True, expert_placement=planned(loads, 2)))

    def gang_of_two() -> Replica:
        return make(gang(2, count_experts=True, expert_placement=planned(loads, 2)))

    shares: dict[str, float] = {}

    def measure(name: str, running: Replica) -> float:
        if name not in shares:
            running.call(install_timers)
            shares[name] = exchange_share(running, prompts, answer)
        return throughput(running, prompts, answer)

    values = alternate({"one": one, "engine": engine, "gang": gang_of_two}, measure, times)
    del shares["one"]
    ratios = {name: round(ratio(values, name, "one"), 3) for name in shares}
    best = max(ratios, key=lambda name: ratios[name])
    return {
        "ratio_2_vs_1": ratios[best],
        "exchange_share": shares[best],
        "ratio_2_vs_1_each": ratios,
        "exchange_share_each": shares,
        "ratio_alternations": times,
        "ratio_compiled": not eager,
        "tokens_per_s_32": {name: round(statistics.median(each), 1) for name, each in values.items()},
    }


def measure_placement_gain(models: Models, loads: list[list[int]], times: int, answer: int) -> dict[str, Any]:
    """Two ranks on the skewed model: planned placement against linear."""
    prompts = questions(models.skewed, SEQUENCES, skip=SEQUENCES)
    placed = Parallelism(2, enable_expert_parallel=True, expert_placement=planned(loads, 2))
    kinds = {
        "linear": lambda: replica(models.skewed, TWO, dtype="bfloat16"),
        "planned": lambda: replica(models.skewed, placed, dtype="bfloat16"),
    }
    values = alternate(kinds, lambda _, running: throughput(running, prompts, answer), times)
    return {"placement_gain": round(ratio(values, "planned", "linear"), 3)}


def measure_sparse(models: Models, times: int, answer: int) -> dict[str, Any]:
    """The mixture against a dense model of the same total size, one rank: one stream, a long prompt, 32 streams."""
    one, many = questions(models.distinct, 1), questions(models.distinct, SEQUENCES)
    long = [(one[0] * PREFILL)[:PREFILL]]
    work = {
        "decode": lambda running: answer / running.time(one, answer),
        "prefill": lambda running: PREFILL / running.time([_varied(long[0])], 1),
        "streams_32": lambda running: throughput(running, many, answer),
    }
    kinds = {
        "sparse": lambda: replica(models.distinct, Parallelism(), dtype="bfloat16"),
        "dense": lambda: replica(models.dense, Parallelism(), dtype="bfloat16"),
    }
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}

    def all_of_it(name: str, running: Replica) -> float:
        measured[name].append(tuple(task(running) for task in work.values()))
        return measured[name][-1][0]

    alternate(kinds, all_of_it, times)
    total, active, experts = parameters(models.distinct)
    gain = {
        task: statistics.median(
            sparse[place] / dense[place] for sparse, dense in zip(measured["sparse"], measured["dense"], strict=True)
        )
        for place, task in enumerate(work)
    }
    possible = total / active
    # 32 tokens choose 64 experts of 8 in each layer: nearly all weights are read, as in the dense model.
    read = 1 - (1 - 2 / 8) ** SEQUENCES
    return {
        "sparse_vs_dense": {
            "decode": round(gain["decode"] / possible, 3),
            "prefill": round(gain["prefill"] / possible, 3),
            "gain": {task: round(value, 2) for task, value in gain.items()},
            "total_over_active": round(possible, 2),
            "streams_32_gain": round(gain["streams_32"], 2),
            "streams_32_limit_by_memory": round(total / (total - (1 - read) * experts), 2),
            "streams_32_limit_by_arithmetic": round(possible, 2),
        }
    }


_turn = 0


def _varied(prompt: list[int]) -> list[int]:
    """A prompt that no cache has seen: it begins otherwise."""
    global _turn
    _turn += 1
    return [1000 + _turn, *prompt[1:]]


def parameters(folder: Path) -> tuple[int, int, int]:
    """In all, used per token, and of the experts; the embedding counts once, as the output layer does per token."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    hidden, layers, wide = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads, kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    expert = 3 * hidden * wide
    rest = layers * (2 * heads + 2 * kv) * width * hidden + config["vocab_size"] * hidden
    experts = layers * config["num_local_experts"] * expert
    return rest + experts, rest + layers * config["num_experts_per_tok"] * expert, experts


def measure_counters(models: Models, times: int, answer: int) -> dict[str, Any]:
    """The share of its steps that a worker spends counting, 32 streams, all seconds taken in the same steps.

    Beside it the speed with and without, in turn in one engine: on a busy machine that says less.
    """
    prompts = questions(models.distinct, SEQUENCES)
    with replica(models.distinct, Parallelism(count_experts=True), dtype="bfloat16") as running:
        throughput(running, prompts, 4)
        running.call(install_timers)
        throughput(running, prompts, answer)
        (seconds,) = running.call(read_timers)
        cost = round(seconds["counting"] / seconds["step"], 4)
        tell(f"counting: {cost:.4f} of a step")
        ratios = []
        for number in range(times):
            speeds = {}
            for on in (True, False) if number % 2 else (False, True):
                running.call(turn_counters, on)
                speeds[on] = throughput(running, prompts, answer)
            ratios.append(speeds[True] / speeds[False])
            tell(f"counting: {ratios[-1]:.3f} of the speed without")
    return {
        "counters_cost": cost,
        "counters_speed_ratio": round(statistics.median(ratios), 3),
        "counters_alternations": times,
    }
