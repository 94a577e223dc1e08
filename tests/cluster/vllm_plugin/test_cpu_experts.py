"""A rank picks the pairs of its own experts, adds up what they give, and counts what was routed and computed."""

import pytest

pytestmark = pytest.mark.requires("vllm")

TOKENS, EXPERTS, CHOSEN, HIDDEN = 9, 8, 2, 5


@pytest.fixture
def routed():
    import torch

    random = torch.Generator().manual_seed(3)
    logits = torch.randn(TOKENS, EXPERTS, generator=random)
    weights, ids = logits.softmax(-1).topk(CHOSEN)
    return weights, ids.to(torch.int32), torch.randn(TOKENS, HIDDEN, generator=random)


def test_each_pair_is_taken_by_exactly_one_rank(routed) -> None:
    import torch

    from cluster.vllm_plugin.cpu_experts import local_pairs
    from cluster.vllm_plugin.placed_experts import expert_map

    weights, ids, _ = routed
    ranks = [0, 1, 1, 0, 0, 1, 0, 1]
    taken = []
    for rank in range(2):
        held = [expert for expert in range(EXPERTS) if ranks[expert] == rank]
        rows, local, local_weights = local_pairs(ids, weights, expert_map(ranks, rank, 4))
        taken += [
            (row, held[expert], weight)
            for row, expert, weight in zip(rows.tolist(), local.tolist(), local_weights.tolist(), strict=True)
        ]
        assert local.dtype == torch.int32
    wanted = [(t, int(ids[t, k]), float(weights[t, k])) for t in range(TOKENS) for k in range(CHOSEN)]
    assert sorted(taken) == sorted(wanted)


def test_the_ranks_results_add_up_to_the_whole(routed) -> None:
    import torch

    from cluster.vllm_plugin.cpu_experts import local_pairs, sum_per_token
    from cluster.vllm_plugin.placed_experts import expert_map

    weights, ids, hidden = routed
    factors = torch.arange(1.0, EXPERTS + 1)
    whole = ((factors[ids] * weights).sum(1, keepdim=True)) * hidden
    total = torch.zeros_like(hidden)
    ranks = [3, 0, 2, 1, 1, 3, 2, 0]
    for rank in range(4):
        held = torch.tensor([expert for expert in range(EXPERTS) if ranks[expert] == rank])
        rows, local, local_weights = local_pairs(ids, weights, expert_map(ranks, rank, 2))
        products = hidden[rows] * (factors[held[local]] * local_weights)[:, None]
        total += sum_per_token(products, rows, TOKENS)
    torch.testing.assert_close(total, whole)


def test_sums_of_half_precision_are_rounded_once() -> None:
    import torch

    from cluster.vllm_plugin.cpu_experts import sum_per_token

    products = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    # In bfloat16 256 + 1 is 256 again, twice.
    assert sum_per_token(products, torch.tensor([0, 0, 0]), 2).tolist() == [[258.0], [0.0]]


def test_a_plan_that_does_not_fit_the_room_is_refused() -> None:
    from cluster.vllm_plugin.placed_experts import expert_map

    assert expert_map([1, 0, 1, 0], 1, 2).tolist() == [0, -1, 1, -1]
    with pytest.raises(ValueError, match="gives rank 1 3 experts, but it has room for 2"):
        expert_map([1, 0, 1, 1], 1, 2)


def test_counts_of_requests_and_of_filling_rows_are_kept_apart(routed) -> None:
    from cluster.vllm_plugin.expert_counters import ExpertCounts

    _, ids, _ = routed
    layers = [ids, ids.flip(0)]
    counts = ExpertCounts()
    for layer in (0, 1):
        assert counts.add_layer(EXPERTS, None) == layer
    counts.begin_step(TOKENS - 2)
    for layer, chosen in enumerate(layers):
        counts.note_routed(layer, chosen)
        counts.note_computed(layer, chosen)
    counts.end_step()
    for layer, chosen in enumerate(layers):
        sets = [set(pair) for pair in chosen.tolist()]
        for a in range(EXPERTS):
            for b in range(EXPERTS):
                assert counts.together[layer, a, b] == sum({a, b} <= pair for pair in sets[:-2])
            assert counts.filling[layer, a] == sum(a in pair for pair in sets[-2:])
        whole = counts.together[layer].diag() + counts.filling[layer]
        assert whole.tolist() == counts.computed[layer].tolist()
    counts.reset()
    assert counts.together.sum() == counts.filling.sum() == counts.computed.sum() == 0


def test_steps_that_no_request_is_in_only_fill(routed) -> None:
    from cluster.vllm_plugin.expert_counters import ExpertCounts

    _, ids, _ = routed
    counts = ExpertCounts()
    counts.add_layer(EXPERTS, None)
    for _ in range(3):  # nobody says that a step begins or ends
        counts.note_routed(0, ids[:1])
    counts.end_step()
    assert counts.together.sum() == 0
    assert counts.filling.sum() == 3 * CHOSEN


def test_computed_pairs_are_counted_by_the_expert_behind_the_local_id() -> None:
    import torch

    from cluster.vllm_plugin.expert_counters import ExpertCounts, held_experts

    counts = ExpertCounts()
    counts.add_layer(4, held_experts(torch.tensor([-1, 1, -1, 0])))
    counts.add_layer(4, held_experts(torch.tensor([0, -1, 1, -1])))
    counts.begin_step(3)
    counts.note_computed(0, torch.tensor([0, 0, 1], dtype=torch.int32))
    counts.note_computed(1, torch.tensor([], dtype=torch.int32))
    counts.end_step()
    assert counts.computed.tolist() == [[0, 1, 0, 2], [0, 0, 0, 0]]


def test_counts_of_reported_experts_are_those_of_the_counters(routed) -> None:
    import numpy as np

    from cluster.engines.parallelism import Parallelism
    from cluster.engines.vllm_experts import OutputCounts
    from cluster.vllm_plugin.expert_counters import ExpertCounts

    _, ids, _ = routed
    config = {"num_local_experts": EXPERTS, "num_hidden_layers": 2, "num_experts_per_tok": CHOSEN}
    reported = OutputCounts(Parallelism(count_experts=True), config)
    both = np.stack([ids.numpy(), ids.flip(0).numpy()], axis=1)
    reported.note(both[:4].astype(np.int16))
    reported.note(both[4:].astype(np.int16))
    counts = ExpertCounts()
    counts.add_layer(EXPERTS, None)
    counts.begin_step(TOKENS)
    counts.note_routed(0, ids)
    counts.end_step()
    load = reported.load()
    assert load.pairs.tolist() == counts.together.long().tolist() * 2
    assert load.num_tokens == TOKENS
