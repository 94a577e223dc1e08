"""From the samples of `make bench-overhead` to its figures: medians over the rounds with their 95 % intervals. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.laptop import interval_of_median

Sample = Mapping[str, Any]
Figures = dict[str, Any]
PROXIES = ("windfarm", "windfarm_limited", "litellm")
_SHOWN_AS = {"windfarm": "relay", "windfarm_limited": "relay_limited", "litellm": "litellm"}


def summarise(samples: Mapping[str, Sequence[Sample]]) -> Figures:
    """`samples`: of the part `relay`, and of parts such as `vllm/32` (engine and number of streams)."""
    figures: Figures = {}
    for part, rounds in samples.items():
        if not rounds:
            continue
        if part == "relay":
            figures |= summarise_relay(rounds)
        else:
            engine, _, num_streams = part.partition("/")
            figures |= summarise_streams(engine, int(num_streams), rounds)
    return figures


def summarise_relay(rounds: Sequence[Sample]) -> Figures:
    """Added latency is through minus direct, of the same round; requests per second are those of the best rung."""
    figures: Figures = {"relay_rounds": len(rounds)}
    for kind in ("whole", "stream"):
        mark = "_stream" if kind == "stream" else ""
        best: dict[str, list[float]] = {}
        for proxy in PROXIES:
            shown = _SHOWN_AS[proxy] + mark
            for rank in ("p50_ms", "p95_ms"):
                added = [each[f"{kind}.{proxy}"][rank] - each[f"{kind}.direct"][rank] for each in rounds]
                figures |= figure(f"{shown}_added_{rank}", added, 2)
            best[proxy] = [max(each[f"{kind}.{proxy}"]["per_second"].values()) for each in rounds]
            figures |= figure(f"{shown}_rps", best[proxy], 1)
            ladders = [each[f"{kind}.{proxy}"]["per_second"] for each in rounds]
            figures[f"{shown}_ladder"] = {
                rung: round(statistics.median(ladder[rung] for ladder in ladders), 1) for rung in ladders[0]
            }
            for name in ("cpu_ms", "client_cpu_ms"):
                figures[f"{shown}_{name}_per_request"] = _median(each[f"{kind}.{proxy}"][name] for each in rounds)
        figures[f"direct{mark}_p50_ms"] = _median(each[f"{kind}.direct"]["p50_ms"] for each in rounds)
        for proxy in ("windfarm", "windfarm_limited"):
            ratios = [ours / theirs for ours, theirs in zip(best[proxy], best["litellm"], strict=True)]
            figures |= figure(f"{_SHOWN_AS[proxy]}{mark}_rps_vs_litellm", ratios, 2)
    return figures


def summarise_streams(engine: str, num_streams: int, rounds: Sequence[Sample]) -> Figures:
    """Ratios and differences are those of one round. vLLM's figures have no mark, those of others name them."""
    mark = "" if engine == "vllm" else f"{engine}_"
    figures: Figures = {f"{mark}rounds_{num_streams}": len(rounds)}
    for server in rounds[0]:
        values = {name: [each[server][name] for each in rounds] for name in rounds[0][server]}
        figures[f"{mark}tokens_per_s_{num_streams}_{server}"] = round(statistics.median(values["tokens_per_s"]), 1)
        figures[f"{mark}ttft_ms_{num_streams}_{server}"] = round(1000 * statistics.median(values["first_token_s"]), 1)
        if engine == "vllm":  # the others compute in the process that answers
            figures |= figure(f"cpu_ms_per_token_outside_engine_{num_streams}_{server}", values["outside_cpu_ms"], 3)
        figures[f"{mark}client_cpu_s_{num_streams}_{server}"] = _median(values["client_cpu_s"])
        if server == "bare":
            continue
        if server == "windfarm":
            figures |= figure(f"{mark}endpoint_cpu_ms_per_token_{num_streams}", values["endpoint_cpu_ms"], 3)
        prefix = mark if server == "windfarm" else f"{mark}{server}_"
        ratios = [each[server]["tokens_per_s"] / each["bare"]["tokens_per_s"] for each in rounds]
        added = [1000 * (each[server]["first_token_s"] - each["bare"]["first_token_s"]) for each in rounds]
        figures |= figure(f"{prefix}ratio_tok_s_{num_streams}", ratios, 3)
        figures |= figure(f"{prefix}added_ttft_ms_{num_streams}", added, 1)
    return figures


def figure(name: str, values: Sequence[float], digits: int) -> Figures:
    """The median, and beside it its 95 % interval."""
    low, high = interval_of_median(values)
    return {
        name: round(statistics.median(values), digits),
        f"{name}_interval_95": [round(low, digits), round(high, digits)],
    }


def _median(values: Any) -> float:
    return round(statistics.median(values), 3)
