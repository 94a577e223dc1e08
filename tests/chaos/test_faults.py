"""The short form of `make chaos`: one trial of each fault that needs no running product."""

import pytest

from tests.chaos import knowledge_faults, network_cut, provider_faults, stream_faults
from tests.chaos.faults import Fault

FAULTS = [*stream_faults.faults(True), *provider_faults.faults(True), *knowledge_faults.faults(True)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.row)
async def test_a_fault_does_what_the_contract_says(fault: Fault) -> None:
    outcome = await fault.try_once(is_timed=False)
    assert outcome.problem is None, outcome


@pytest.mark.integration
@pytest.mark.requires("namespaces")
async def test_streams_of_a_node_that_is_cut_off_go_on_elsewhere() -> None:
    (fault,) = network_cut.faults(True)
    outcome = await fault.try_once(is_timed=False)
    assert outcome.problem is None, outcome
