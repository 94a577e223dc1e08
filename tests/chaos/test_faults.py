"""The short form of `make chaos`: one trial of each fault that needs no running product."""

import pytest

from tests.chaos import balancer_faults, knowledge_faults, network_cut, provider_faults, stream_faults
from tests.chaos.faults import Fault

FAULTS = [
    pytest.param(fault, id=fault.row, marks=[pytest.mark.requires(fault.needs)] if fault.needs else [])
    for group in (stream_faults, provider_faults, knowledge_faults)
    for fault in group.faults(True)
]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_does_what_the_contract_says(fault: Fault) -> None:
    outcome = await fault.try_once(is_timed=False)
    assert outcome.problem is None, outcome


@pytest.mark.integration
@pytest.mark.requires("haproxy")
async def test_a_killed_balancer_cuts_its_streams_and_the_next_one_serves() -> None:
    (fault,) = balancer_faults.faults(True)
    outcome = await fault.try_once(is_timed=False)
    assert outcome.problem is None, outcome


@pytest.mark.integration
@pytest.mark.requires("namespaces")
async def test_streams_of_a_node_that_is_cut_off_go_on_elsewhere() -> None:
    (fault,) = network_cut.faults(True)
    outcome = await fault.try_once(is_timed=False)
    assert outcome.problem is None, outcome
