"""vLLM's own processes: their death is noticed, and none outlives us. Contract tests on the pinned version's private
parts: the plugin hook, process titles, the question that health asks."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from cluster.errors import ClusterError
from tests.cluster.engines.conftest import make_local_engine

pytestmark = [pytest.mark.integration, pytest.mark.requires("vllm")]

STARTER = """
    import asyncio, sys
    from tests.cluster.engines.conftest import make_local_engine

    async def main():
        engine = make_local_engine("vllm")
        await engine.start()
        print("started", flush=True)
        await asyncio.Event().wait()

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.mark.ranks
def test_a_killed_starter_takes_its_engine_processes_along(tmp_path) -> None:
    script = tmp_path / "starter.py"
    script.write_text(textwrap.dedent(STARTER))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    starter = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert starter.stdout is not None
        assert "started\n" in starter.stdout, "the engine did not start"  # vLLM logs there as well
        children = psutil.Process(starter.pid).children(recursive=True)
        assert sum(child.name().startswith("VLLM::") for child in children) >= 2
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    _, left = psutil.wait_procs(children, timeout=20)
    # Ended processes whose new parent has not asked for them yet are still listed.
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


async def test_an_unknown_engine_option_is_an_error_and_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    engine = make_local_engine("vllm", options={"warp_speed": 9})
    with pytest.raises(ClusterError, match="warp_speed"):
        await engine.start()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
