"""The deployment that opens the public port where several relays share it by HAProxy (`platform.listen.balancer`).

The relays announce themselves; whoever is there takes requests. Where this replica is lost Serve starts another one;
until then connections wait in the kernel's queue.
"""

import asyncio
import contextlib
import logging

from services.beats import RayBeatStore
from services.config import PlatformConfig
from services.discovery import RELAY_APP, Directory
from services.environment import public_address, read_environment
from services.haproxy import Haproxy
from services.public_port import public_socket
from services.ray_adapter import close_replica_ports
from services.replica_log import log_into_replica_file

LOOK_S = 0.5
_log = logging.getLogger(__name__)


class Balancer:
    """One replica; Serve makes and ends it."""

    async def __init__(self, config: PlatformConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        """The port is open when this returns."""
        close_replica_ports()
        log_into_replica_file()
        environment = read_environment()
        self._directory = Directory(RayBeatStore())
        await self._directory.start()
        sock = public_socket(environment, *public_address(config.listen, environment), environment.public_namespace)
        # Made on the event loop, whose thread lives as long as the replica.
        self._haproxy = Haproxy(sock, self._relays(), environment.home / "run")
        self._task = asyncio.create_task(self._follow(), name="balancer")

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._haproxy.is_running:
            raise RuntimeError("HAProxy has ended")
        if self._task.done():
            raise RuntimeError("nobody tells HAProxy of the relays any more")

    async def __del__(self) -> None:
        """Serve awaits this at a graceful shutdown. Parts are missing where the constructor failed."""
        with contextlib.suppress(AttributeError):
            self._task.cancel()
            await asyncio.to_thread(self._haproxy.stop)
            await self._directory.stop()

    def _relays(self) -> list[tuple[str, str]]:
        return [(each.replica_id, each.url) for each in self._directory.endpoints(RELAY_APP) if each.state == "ready"]

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            relays = self._relays()
            if relays and self._haproxy.share_among(relays):  # where all are silent, it is the directory that is away
                _log.info("HAProxy shares requests among %s.", ", ".join(relay_id for relay_id, _ in relays))
