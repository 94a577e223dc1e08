"""vLLM engines in processes of their own, driven by JSON lines: one engine, or the ranks of a gang.

An engine sets the environment of its process, so that each rank of a gang has one, as in the product.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.engine import GenerationRequest, SamplingParams
from cluster.engines.parallelism import Parallelism
from cluster.engines.settings import EngineSettings
from cluster.expert_load import ExpertLoad
from services.local_network import Seat

# What an engine in this very process may have set for itself.
_LEFT_BY_ENGINES = ("TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "WINDFARM_ENGINE_PARENT", "LD_PRELOAD")
Prompts = Sequence[Sequence[int]]


class EngineProcess:
    """One engine. Starts at once; `ready` waits until it can generate."""

    def __init__(
        self,
        settings: EngineSettings,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
        seat: Seat | None = None,
    ):
        reader, writer = os.pipe()
        self._log = log
        output = log.open("ab") if log is not None else subprocess.DEVNULL
        self._process = subprocess.Popen(
            (seat or Seat("127.0.0.1")).command([sys.executable, "-m", "tests.engine_process", str(writer)]),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if log is not None else None,
            pass_fds=[writer],
            text=True,
            env={name: value for name, value in os.environ.items() if name not in _LEFT_BY_ENGINES}
            | (environment or {}),
        )
        os.close(writer)
        self._answers = os.fdopen(reader)
        values = {name: getattr(settings, name) for name in EngineSettings.__slots__}
        self.send(values | {"location": str(settings.location), "parallelism": asdict(settings.parallelism)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            end = "" if self._log is None else self._log.read_text("utf-8", "replace")[-3000:]
            raise RuntimeError(f"the engine's process ended (exit status {self._process.wait()})\n{end}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def ready(self) -> None:
        assert self.receive() == "ready"

    def ask_to_stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_for_end(self) -> None:
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


class Replica:
    """All ranks of one replica: one engine, or a gang of data-parallel engines. A context manager."""

    def __init__(
        self,
        settings: EngineSettings,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
        seats: Sequence[Seat] = (),
    ):
        """`seats`: a node of this machine for each engine of a gang; without, all run where we do."""
        size = settings.parallelism.data_parallel_size
        seats = list(seats) or [Seat("127.0.0.1")] * size
        gang = replace(
            settings.parallelism,
            data_parallel_rpc_port=_free_port() if size > 1 else 0,
            data_parallel_address=seats[0].address,
        )
        self.engines: list[EngineProcess] = []
        try:
            for rank, seat in enumerate(seats):
                mine = replace(settings, parallelism=replace(gang, data_parallel_rank=rank))
                at_seat = {"VLLM_HOST_IP": seat.address, "GLOO_SOCKET_IFNAME": "wf0" if seat.namespace else "lo"}
                self.engines.append(EngineProcess(mine, log, at_seat | (environment or {}), seat))
            for engine in self.engines:
                engine.ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for engine in self.engines:
            engine.ask_to_stop()
        for engine in self.engines:
            engine.wait_for_end()

    def generate(self, prompts: Prompts, max_tokens: int, *, at: int | None = None) -> list[list[int]]:
        """Greedy continuations of all prompts at once, dealt out over the ranks; `at` sends all to one rank."""
        shares: list[list[int]] = [[] for _ in self.engines]
        for index in range(len(prompts)):
            shares[index % len(self.engines) if at is None else at].append(index)
        for engine, share in zip(self.engines, shares, strict=True):
            engine.send({"do": "generate", "prompts": [list(prompts[i]) for i in share], "max_tokens": max_tokens})
        result: list[list[int]] = [[] for _ in prompts]
        for engine, share in zip(self.engines, shares, strict=True):
            for index, tokens in zip(share, engine.receive(), strict=True):
                result[index] = tokens
        return result

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of all workers of all ranks; answers by rank, flattened."""
        for engine in self.engines:
            engine.send({"do": "ask", "method": method, "args": args})
        return [answer for engine in self.engines for answer in engine.receive()]

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `function(worker, *args)` in all workers. The engines need VLLM_ALLOW_INSECURE_SERIALIZATION."""
        for engine in self.engines:
            engine.send({"do": "call", "function": [function.__module__, function.__name__], "args": args})
        return [answer for engine in self.engines for answer in engine.receive()]

    def loads(self) -> list[ExpertLoad]:
        for engine in self.engines:
            engine.send({"do": "load"})
        return [ExpertLoad.from_json(engine.receive()) for engine in self.engines]

    def time(self, prompts: Prompts, max_tokens: int) -> float:
        """Seconds from the first request to the last token, as the slowest rank sees it."""
        for rank, engine in enumerate(self.engines):
            share = [list(prompt) for prompt in prompts[rank :: len(self.engines)]]
            engine.send({"do": "time", "prompts": share, "max_tokens": max_tokens})
        return max(engine.receive() for engine in self.engines)


def gang(size: int, tensor: int = 1, **more: Any) -> Parallelism:
    """A data-parallel gang on this machine."""
    more = {"enable_expert_parallel": True} | more
    return Parallelism(tensor_parallel_size=tensor, data_parallel_size=size, data_parallel_rpc_port=1, **more)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _serve(answers: int) -> None:
    from cluster.engines.vllm import VllmEngine

    with os.fdopen(answers, "w") as out:
        engine: VllmEngine | None = None
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            try:
                if engine is None:
                    engine = VllmEngine(_settings(command))
                    await engine.start()
                    result: Any = "ready"
                else:
                    result = await _answer(engine, command)
                answer = {"result": result}
            except Exception as error:  # noqa: BLE001  # the other side raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(answer) + "\n")
            out.flush()
        if engine is not None:
            await engine.stop()


def _settings(values: dict[str, Any]) -> EngineSettings:
    parallel = values["parallelism"]
    if parallel["expert_placement"] is not None:
        parallel["expert_placement"] = tuple(tuple(layer) for layer in parallel["expert_placement"])
    return EngineSettings(**values | {"parallelism": Parallelism(**parallel)})


async def _answer(engine: Any, command: dict[str, Any]) -> Any:
    match command["do"]:
        case "generate":
            return await _generate(engine, command["prompts"], command["max_tokens"])
        case "time":
            begin = time.perf_counter()
            await _generate(engine, command["prompts"], command["max_tokens"])
            return time.perf_counter() - begin
        case "ask":
            return await engine._engine.collective_rpc(command["method"], args=tuple(command["args"]))
        case "call":
            module, name = command["function"]
            function = getattr(importlib.import_module(module), name)
            return await engine._engine.collective_rpc(function, args=tuple(command["args"]))
        case "load":
            load = await engine.expert_load()
            return None if load is None else load.to_json()
    raise ValueError(command)


async def _generate(engine: Any, prompts: Prompts, max_tokens: int) -> list[list[int]]:
    async def one(prompt: Sequence[int]) -> list[int]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        tokens: list[int] = []
        async for chunk in engine.generate(GenerationRequest("r", prompt_token_ids=tuple(prompt), sampling=sampling)):
            tokens.extend(chunk.token_ids)
        return tokens

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
