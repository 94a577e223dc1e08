"""The oracle of everything that spreads experts: single-process Transformers in float32.

An answer is judged in one pass over prompt and answer: each of its tokens must be the one that Transformers would have
taken greedily after all tokens before it. By induction that is its greedy answer, until a token differs. A token that
differs passes only as a near tie: where Transformers' own two best logits are closer than `NEAR_TIE` and it is the
second of them; from there on the answer's own continuation is judged, and the tie is counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEAR_TIE = 1e-4
Tokens = Sequence[int]


@dataclass(slots=True)
class Verdict:
    """`exact` of `prompts` answers are Transformers' own; of their tokens `near_ties` are the second of two equals.

    `largest_gap`: how far below Transformers' best logit a token was at most, in all answers. Engines that compute in
    half precision take tokens a little below the best; wrong experts take tokens far below.
    """

    prompts: int = 0
    exact: int = 0
    near_ties: int = 0
    largest_gap: float = 0.0
    differences: list[str] = field(default_factory=list)


class Reference:
    """One checkpoint in Transformers, float32, in this process."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._seen: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, float, str]] = {}

    def judge(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Verdict:
        verdict = Verdict()
        for prompt, answer in zip(prompts, answers, strict=True):
            key = (tuple(prompt), tuple(answer))
            if key not in self._seen:
                self._seen[key] = self._judge_one(*key)
            near_ties, gap, difference = self._seen[key]
            verdict.prompts += 1
            verdict.largest_gap = max(verdict.largest_gap, gap)
            if difference:
                verdict.differences.append(difference)
            else:
                verdict.exact += 1
                verdict.near_ties += near_ties
        return verdict

    def _judge_one(self, prompt: Tokens, answer: Tokens) -> tuple[int, float, str]:
        """Near ties, the largest gap, and where the answer first leaves the reference's ("" if nowhere)."""
        import torch

        logits = self._forward([*prompt, *answer]).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        gaps = best.values[:, 0] - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        near_ties, difference = 0, ""
        for place, token in enumerate(answer):
            (first, second), (top, next_best) = best.values[place].tolist(), best.indices[place].tolist()
            if token == top:
                continue
            if token == next_best and first - second < NEAR_TIE:
                near_ties += 1
                continue
            difference = f"token {place}: {token}, but {top} leads {next_best} by {first - second:.2g}"
            break
        return near_ties, float(gaps.max()), difference

    def continue_greedily(self, prompt: Tokens, num_tokens: int, forbidden: Tokens) -> list[int]:
        """The answer itself, for engines whose tokens nobody sees."""
        import torch

        tokens = torch.tensor([list(prompt)])
        with torch.inference_mode():
            made = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=num_tokens,
                suppress_tokens=list(forbidden),
                pad_token_id=0,
            )
        return [int(token) for token in made[0, len(prompt) :]]

    def routed(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[list[int]]:
        """Tokens routed to each expert in each layer, [layer][expert]; an answer's last token goes through no layer."""
        import torch

        config = self._model.config
        counts = torch.zeros((config.num_hidden_layers, config.num_local_experts), dtype=torch.int64)
        for prompt, answer in zip(prompts, answers, strict=True):
            routers = self._forward([*prompt, *answer[:-1]], output_router_logits=True).router_logits
            for layer, logits in enumerate(routers):
                chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
        return [[int(count) for count in layer] for layer in counts]

    def notices_swap(
        self, layer: int, first: int, second: int, prompts: Sequence[Tokens], answers: Sequence[Tokens]
    ) -> bool:
        """Whether one of these answers, which are the reference's own, is not with two experts of a layer swapped.

        The mixture computes something else then, whatever runs it: an engine with such a fault is found out.
        """
        weights = self._experts_of(layer)
        self._swap(weights, first, second)
        try:
            return any(self._judge_one(prompt, answer)[2] for prompt, answer in zip(prompts, answers, strict=True))
        finally:
            self._swap(weights, first, second)

    def _experts_of(self, layer: int) -> list[Any]:
        """Parameters of a layer's experts; Transformers keeps all experts of a layer in one, [expert, ...]."""
        found = [each for name, each in self._model.named_parameters() if f"layers.{layer}.mlp.experts." in name]
        if not found or any(each.shape[0] != self._model.config.num_local_experts for each in found):
            raise ValueError(f"The experts of layer {layer} are not where this version of Transformers keeps them.")
        return found

    def _swap(self, weights: Sequence[Any], first: int, second: int) -> None:
        import torch

        with torch.no_grad():
            for weight in weights:
                weight[[first, second]] = weight[[second, first]].clone()

    def _forward(self, tokens: Tokens, **more: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([list(tokens)]), use_cache=False, **more)


def shortened(parent: Path, folder: Path, num_layers: int) -> Path:
    """A checkpoint of the first layers of a dense one: quick to load, and still with sensible weights."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    for file in parent.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "manifest.json"):
            shutil.copy2(file, folder / file.name)
    config = json.loads((parent / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}), "utf-8")
    tensors = {
        name: tensor
        for file in parent.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < num_layers
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def swap_map_entries(worker: Any, layer: int, first: int, second: int) -> None:
    """Runs in a worker. The mutation: swaps two entries of a layer's expert map after the weights are loaded."""
    modules = [module for module in worker.model_runner.model.modules() if type(module).__name__ == "RoutedExperts"]
    expert_map = modules[layer]._expert_map
    expert_map[[first, second]] = expert_map[[second, first]]


def num_compiled_graphs(worker: Any) -> int:
    """Runs in a worker."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
