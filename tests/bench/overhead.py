"""`make bench-overhead`: what the public endpoint costs, with keys, limits, database and waiting rooms on.

- `relay`: the endpoint beside the LiteLLM proxy, both before the same backend that does nothing, one worker each.
- `vllm`, `llamacpp`: tokens per second, first token and processor time per token at 1, 8 and 32 streams beside the bare
  server of the engine, with the same model, threads and slots; of vLLM also Ray Serve LLM as it comes.

All are asked in turn, round by round; each figure is the median over the rounds with its interval. The load client is a
process of its own, whose processor time is told apart. The last line printed is one JSON object.

    ARGS="--only relay"                                one part
    ARGS="--only vllm --streams 32 --rounds 4 --results so-far.json"    adds rounds to those of earlier runs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.overhead_relay import measure_relay
from tests.bench.overhead_servers import Server, bare_llamacpp, bare_vllm, ray_serve_llm, vllm_options, windfarm
from tests.bench.overhead_streams import measure_streams
from tests.bench.overhead_summary import summarise

PARTS = ("relay", "vllm", "llamacpp")


class Results:
    """Samples of all rounds so far, kept in a file where one is named, so that what was measured is never lost."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.samples: dict[str, list[Any]] = {}
        if path is not None and path.exists():
            self.samples = json.loads(path.read_text(encoding="utf-8"))

    def keeper(self, part: str) -> Callable[[Any], None]:
        def keep(sample: Any) -> None:
            self.samples.setdefault(part, []).append(sample)
            if self._path is not None:
                self._path.write_text(json.dumps(self.samples), encoding="utf-8")

        return keep


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    results = Results(options.results)
    with tempfile.TemporaryDirectory(prefix="windfarm-bench-") as folder:
        for part in options.only:
            home = Path(folder, part)
            if part == "relay":
                measure_relay(home, options.rounds, options.rungs, options.seconds, results.keeper(part))
                continue
            with servers_of(part, home, max(options.streams), with_ray=options.ray) as servers:
                for num_streams in options.streams:
                    keep = results.keeper(f"{part}/{num_streams}")
                    measure_streams(servers, num_streams, options.tokens, options.rounds, keep)
    print(json.dumps(summarise(results.samples) | {"cpus": os.cpu_count()}))


@contextmanager
def servers_of(engine: str, home: Path, slots: int, *, with_ray: bool) -> Iterator[dict[str, Server]]:
    """All servers of one engine at once; those that are not asked wait."""
    with ExitStack() as stack:
        if engine == "llamacpp":
            up = stack.enter_context(windfarm(home, engine, slots))
            yield {"windfarm": up, "bare": stack.enter_context(bare_llamacpp(home, slots))}
            return
        owned = ("max_model_len", "max_num_seqs")  # the section of the model says these itself
        settings = {name: value for name, value in vllm_options(slots).items() if name not in owned}
        servers = {"windfarm": stack.enter_context(windfarm(home, engine, slots, settings))}
        servers["bare"] = stack.enter_context(bare_vllm(home, slots))
        if with_ray:
            servers["ray_serve_llm"] = stack.enter_context(ray_serve_llm(home, slots))
        yield servers


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of each part and number of streams")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one answer")
    parser.add_argument("--rungs", type=int, nargs="+", default=[4, 16, 64], help="clients of the relay's ladder")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load on a relay")
    parser.add_argument("--results", type=Path, help="a file with samples of earlier runs, to add to")
    parser.add_argument(
        "--ray", action=argparse.BooleanOptionalAction, default=True, help="with vLLM: Ray Serve LLM as well"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
