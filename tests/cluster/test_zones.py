"""Which node a further replica goes to, and which zone a further gang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from cluster.zones import (
    LiveNode,
    how_often,
    node_for_replica,
    nodes_of_selector,
    num_zones,
    selector_of_nodes,
    zone_label,
    zones_for_gang,
)

RANK = {"CPU": 1.0}


def node(name: str, zone: str | None, free: float = 4.0, label: str = "ray.io/availability-zone") -> LiveNode:
    return LiveNode(name, {label: zone} if zone else {}, {"CPU": free}, {"CPU": 4.0})


TWO_ZONES = [node("a1", "a"), node("a2", "a"), node("b1", "b")]


def test_nodes_without_a_copy_come_first_then_zones_without_one_then_the_emptiest() -> None:
    def choose(copies: dict[str, int], load: dict[str, int] | None = None) -> str | None:
        return node_for_replica(TWO_ZONES, RANK, Counter(copies), Counter(load or copies))

    assert choose({"a1": 1}) == "b1"
    assert choose({"a1": 1, "b1": 1}) == "a2"
    assert choose({"a1": 2, "a2": 2, "b1": 1}) == "b1"
    assert choose({}, {"a1": 2, "a2": 1, "b1": 3}) == "a2"


def test_a_node_without_room_is_not_chosen_and_none_where_there_is_no_room_at_all() -> None:
    nodes = [node("a1", "a", 0.9), node("b1", "b", 1.0)]
    assert node_for_replica(nodes, RANK, Counter({"b1": 5}), Counter()) == "b1"
    assert node_for_replica(nodes, {"CPU": 1.0, "GPU": 1.0}, Counter(), Counter()) is None


@pytest.mark.parametrize(
    ("free", "needs", "times"),
    [
        ({"CPU": 0.3}, {"CPU": 0.1}, 3),
        ({"CPU": 8.0, "memory": 5.0}, {"CPU": 1.0, "memory": 2.0}, 2),
        ({"CPU": 8.0}, {"CPU": 1.0, "memory": 2.0}, 0),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 0.0}, 8),
    ],
)
def test_room_is_what_the_scarcest_amount_allows(
    free: Mapping[str, float], needs: Mapping[str, float], times: int
) -> None:
    assert how_often(free, needs) == times


def test_a_gang_takes_the_zone_with_the_fewest_ranks_of_its_model_that_holds_it_whole() -> None:
    assert zones_for_gang(TWO_ZONES, RANK, 4, Counter()) == [["a1", "a2"], ["b1"]]
    assert zones_for_gang(TWO_ZONES, RANK, 4, Counter({"a1": 4})) == [["b1"], ["a1", "a2"]]
    assert zones_for_gang(TWO_ZONES, RANK, 5, Counter({"a1": 4})) == [["a1", "a2"]]
    assert zones_for_gang(TWO_ZONES, RANK, 9, Counter()) == []


def test_a_zone_that_is_full_now_is_waited_for_by_its_label_where_all_nodes_have_it() -> None:
    full = [node("a1", "a", 0.0), node("b1", "b", 0.0)]
    assert zones_for_gang(full, RANK, 4, Counter()) == []
    assert zone_label(full, RANK, 4) == "ray.io/availability-zone"
    assert zone_label(full, RANK, 5) is None, "no zone will ever hold it"
    assert zone_label([*full, node("c1", "c", 0.0, "zone")], RANK, 4) is None, "Ray compares one label"
    assert zone_label([*full, node("c1", None, 0.0)], RANK, 4) is None


def test_nodes_without_a_label_are_a_zone_of_their_own() -> None:
    assert num_zones(TWO_ZONES) == 2
    assert num_zones([node("x", None), node("y", None)]) == 1
    assert num_zones([node("x", None), node("a1", "a")]) == 2


def test_a_selector_of_nodes_is_read_back_and_no_other_is_taken_for_one() -> None:
    assert nodes_of_selector(selector_of_nodes(["1f", "2e"])) == ["1f", "2e"]
    for other in ({}, {"ray.io/node-id": "1f"}, {"zone": "in(a)"}, {"ray.io/node-id": "in(1f)", "zone": "a"}):
        assert nodes_of_selector(other) is None
