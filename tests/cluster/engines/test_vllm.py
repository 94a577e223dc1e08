"""vLLM's own processes: none is left of a start that fails. `test_expert_parallel.py`: they end with their starter."""

import psutil
import pytest

from cluster.errors import ClusterError
from tests.cluster.engines.conftest import make_local_engine

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]


async def test_an_unknown_engine_option_is_an_error_and_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    engine = make_local_engine("vllm", options={"warp_speed": 9})
    with pytest.raises(ClusterError, match="warp_speed"):
        await engine.start()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
