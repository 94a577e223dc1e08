"""The parts of `make bench-experts` that need no engine: which ways are run and kept, and how figures are made."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.engines.parallelism import Parallelism
from tests.bench import expert_exactness, experts
from tests.bench.expert_exactness import ONE_RANK, WAYS, measure_exactness, pairs_exact
from tests.bench.expert_parts import Models, ratio
from tests.bench.expert_speed import parameters
from tests.expert_oracle import Verdict

LOADS = [[80, 70, 20, 10, 10, 10, 10, 10]] * 2
PROMPTS = 3
NO_NETWORK = "no namespaces here"
KEPT: list[dict[str, Any]] = []
"""What the last measurements have handed over to be kept."""


class Rank:
    """Stands for an engine: it answers, and has counted `LOADS`."""

    def generate(self, prompts: Sequence[Any], answer: int) -> list[list[int]]:
        return [[1] * answer for _ in prompts]

    def loads(self) -> list[Any]:
        return [SimpleNamespace(tokens=np.array(LOADS))]


class Transformers:
    """Stands for the reference: all answers are its own, and it notices every swap."""

    def __init__(self, folder: Path) -> None: ...

    def judge(self, prompts: Sequence[Any], answers: Sequence[Any]) -> Verdict:
        return Verdict(prompts=len(prompts), exact=len(answers))

    def notices_swap(self, *_: Any) -> bool:
        return True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Parallelism]:
    """How the engines were cut that a measurement has started."""
    cut: list[Parallelism] = []
    KEPT.clear()

    @contextmanager
    def replica(_: Path, parallelism: Parallelism, **__: Any) -> Iterator[Rank]:
        cut.append(parallelism)
        yield Rank()

    monkeypatch.setattr(Models, "distinct", tmp_path)
    monkeypatch.setattr(expert_exactness, "replica", replica)
    monkeypatch.setattr(expert_exactness, "Reference", Transformers)
    monkeypatch.setattr(expert_exactness, "questions", lambda _, number: [[7]] * number)
    monkeypatch.setattr(expert_exactness, "pairs_exact", lambda _: 1)
    monkeypatch.setattr(expert_exactness, "two_nodes", lambda: nullcontext(()))
    monkeypatch.setattr(expert_exactness, "why_no_network", lambda: None)
    return cut


def measure(earlier: dict[str, Any], *only: str, answer: int = 4) -> dict[str, Any]:
    """What the results file holds in the end, read back as the command reads it."""
    result = measure_exactness(Models(Path()), PROMPTS, answer, only, earlier, KEPT.append)
    return dict(json.loads(json.dumps(earlier | result)))


def test_ways_that_are_run_one_by_one_give_what_one_run_gives(started: list[Parallelism]) -> None:
    at_once = measure({})
    assert [len(each["exact_each"]) for each in KEPT] == [*range(1, len(WAYS) + 1)], "kept after each way"
    all_cut = started.copy()
    assert len(all_cut) == len(WAYS)
    assert len(set(all_cut)) < len(WAYS), "the same ranks compiled or on two nodes"
    started.clear()
    one_by_one: dict[str, Any] = {}
    for number, way in enumerate(WAYS, 1):
        one_by_one = measure(one_by_one, way.name)
        assert list(one_by_one["exact_each"]) == [each.name for each in WAYS[:number]]
        assert list(one_by_one["left_out"].values()) == ["not run"] * (len(WAYS) - number)
    assert started == all_cut
    assert one_by_one == at_once
    assert (one_by_one["exact"], one_by_one["prompts"], one_by_one["swaps_noticed"]) == (PROMPTS, PROMPTS, 4)
    measure(one_by_one)
    assert started == all_cut, "what is known was run again"


def test_a_way_alone_measures_the_loads_that_it_is_planned_from_first(started: list[Parallelism]) -> None:
    way = next(way for way in WAYS if way.name == "4 ranks, gang of 2 engines, planned")
    assert list(measure({}, way.name)["exact_each"]) == [ONE_RANK.name, way.name]
    one, four = started
    assert (one.num_ranks, four.tensor_parallel_size, four.data_parallel_size) == (1, 2, 2)
    assert four.expert_placement is not None
    assert {layer[0] for layer in four.expert_placement} != {layer[1] for layer in four.expert_placement}


def test_results_of_other_answers_are_measured_again(started: list[Parallelism]) -> None:
    earlier = measure({}, ONE_RANK.name)
    measure(earlier, ONE_RANK.name, answer=5)
    assert len(started) == 2


def test_ways_that_this_machine_cannot_have_are_named_with_the_reason(
    started: list[Parallelism], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_exactness, "why_no_network", lambda: NO_NETWORK)
    result = measure({})
    on_nodes = [way.name for way in WAYS if way.is_on_nodes]
    assert on_nodes
    assert result["left_out"] == dict.fromkeys(on_nodes, NO_NETWORK)
    assert not set(on_nodes) & set(result["exact_each"])


def test_a_way_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["experts", "--ways", "3 ranks"])
    with pytest.raises(SystemExit):
        experts.read_options()
    assert ONE_RANK.name in capsys.readouterr().err


def test_the_figure_is_that_of_the_worst_way(started: list[Parallelism]) -> None:
    better = {"exact": 3, "near_ties": 0, "pairs_exact": 1}
    worse = {"exact": 1, "near_ties": 2, "pairs_exact": 0}
    each = {way.name: worse if number == 1 else better for number, way in enumerate(WAYS)}
    known = {"prompts": PROMPTS, "exact_each": each, "distinct_load": LOADS, "swaps": 4}
    result = measure(known)
    assert started == []
    assert (result["exact"], result["near_ties"], result["pairs_exact"]) == (1, 2, 0)


def counts(tokens: list[int], computed: list[int], filling: int = 0) -> dict[str, Any]:
    """Of one layer with four experts: what a rank's router sent to each, and what the rank computed of each."""
    return {"together": [np.diag(tokens).tolist()], "filling": [[filling] * 4], "computed": [computed]}


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        ([4, 3, 0, 0], [0, 0, 2, 6], 1),
        ([4, 2, 0, 0], [0, 0, 2, 6], 0),  # a pair is lost
        ([4, 3, 0, 0], [0, 0, 3, 6], 0),  # a pair is computed twice
        ([4, 2, 1, 0], [0, 1, 1, 6], 0),  # two ranks computed for each other
    ],
)
@pytest.mark.parametrize("is_gang", [True, False])
def test_pairs_are_exact_where_every_rank_computed_what_was_sent_to_its_experts(
    first: list[int], second: list[int], exact: int, is_gang: bool
) -> None:
    # Ranks of a gang route their own tokens, one of them fills its batch; those of one engine see the same tokens.
    routed = [([3, 2, 1, 2], 0), ([0, 0, 0, 3], 1)] if is_gang else [([4, 3, 2, 6], 0)] * 2
    of_ranks = [counts(*routed[0][:1], first, routed[0][1]), counts(*routed[1][:1], second, routed[1][1])]
    answers = {"windfarm_expert_counts": of_ranks, "windfarm_held_experts": [[[0, 1]], [[2, 3]]]}
    running: Any = SimpleNamespace(ask=answers.__getitem__, engines=[None] * (2 if is_gang else 1))
    assert pairs_exact(running) == exact


def test_parameters_are_counted_once_and_active_ones_by_the_experts_of_a_token(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 3,
        "vocab_size": 10,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Of a layer: queries and output 4 x 6 each, keys and values 4 x 3 each; an expert has three matrices of 4 x 6.
    rest = 2 * (2 * 24 + 2 * 12) + 10 * 4
    assert parameters(tmp_path) == (rest + 2 * 8 * 72, rest + 2 * 2 * 72, 2 * 8 * 72)


def test_a_ratio_is_the_median_of_those_of_neighbours_in_time() -> None:
    values = {"two": [3.0, 30.0, 8.0], "one": [2.0, 10.0, 8.0]}
    assert ratio(values, "two", "one") == 1.5
