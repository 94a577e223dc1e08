"""The life of one rank: it meets its gang, watches it, and ends itself when the gang has lost a rank.

Ending the process is what makes Serve restart the gang as a whole, at once and not after some failed health checks;
and it is the only sure way out of a collective that waits for a peer that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time

import psutil

from cluster.errors import ClusterError, EngineDead
from services.beats import BeatStore
from services.gang import GangSeat, GangWatch, Meeting, meet, part
from services.gang_loss import GangLost, Loss, record_loss
from services.model_service import ModelService

_CHECK_EVERY_S = 0.5
_STORE_S = 1.0
# An engine may notice the end of a peer before the peer's connections are closed.
_CAUSE_S = 1.0
_EXIT_CODE = 1

_log = logging.getLogger(__name__)


def use_network_of(host: str) -> None:
    """Have vLLM and gloo use the interface with this address of the node; by themselves they take the machine's name
    or its way to the outside."""
    names = [
        name for name, addresses in psutil.net_if_addrs().items() if any(each.address == host for each in addresses)
    ]
    if not names and not ipaddress.ip_address(host).is_loopback:
        raise ClusterError(f"No interface of this node has the address {host}; correct WINDFARM_INTERNAL_HOST.")
    # All of 127.0.0.0/8 is reached through the loopback interface, whichever of its addresses is written there.
    os.environ["GLOO_SOCKET_IFNAME"] = names[0] if names else "lo"
    os.environ["VLLM_HOST_IP"] = host


class GangMember:
    """Use `join` before the engine is made and `watch` when the service runs."""

    def __init__(self, app: str, seat: GangSeat, store: BeatStore, secret: str) -> None:
        self._app = app
        self._seat = seat
        self._store = store
        self._watch = GangWatch(store, app, seat, secret, self._rank_is_lost)
        self._service: ModelService | None = None
        self._checking: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def join(self, host: str) -> Meeting:
        """Wait for the other ranks. `host` is the address of this rank's node."""
        use_network_of(host)
        meeting = await meet(self._store, self._seat, host)
        _log.info(
            "Rank %d of %d of gang %s; rank 0 waits at %s:%d, ranks are on %s",
            self._seat.rank,
            self._seat.size,
            self._seat.gang,
            meeting.address,
            meeting.port,
            ", ".join(meeting.hosts),
        )
        return meeting

    async def watch(self, service: ModelService) -> None:
        """The engine runs on all ranks: from now on the gang stands and falls together."""
        await part(self._store, self._seat)
        self._service = service
        self._watch.start()
        self._checking = asyncio.create_task(self._check_own_engine(), name="own engine")

    def stop(self) -> None:
        """Before an orderly stop, in which ranks end one after the other."""
        self._watch.stop()
        if self._checking is not None:
            self._checking.cancel()

    async def _check_own_engine(self) -> None:
        assert self._service is not None
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            try:
                await self._service.check_health()
            except EngineDead as error:
                await self._leave_word(self._loss(self._seat.rank, str(error), is_guess=True))
                await asyncio.sleep(_CAUSE_S)
                self._rank_is_lost(self._seat.rank, str(error))
                return

    def _rank_is_lost(self, rank: int, reason: str) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(rank, reason), name="end of the gang")

    async def _end(self, rank: int, reason: str) -> None:
        assert self._service is not None
        loss = self._loss(rank, reason)
        _log.error("Gang %s lost rank %d: %s. Ending rank %d with it.", loss.gang, rank, reason, self._seat.rank)
        await self._leave_word(loss)
        with contextlib.suppress(Exception):
            await self._service.give_up(GangLost(loss.sentence))
        logging.shutdown()
        os._exit(_EXIT_CODE)

    def _loss(self, rank: int, reason: str, *, is_guess: bool = False) -> Loss:
        return Loss(self._app, self._seat.gang, rank, reason, time.time(), is_guess)

    async def _leave_word(self, loss: Loss) -> None:
        """For the report; nothing that goes wrong here may keep this process."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_STORE_S):
                await record_loss(self._store, loss)
