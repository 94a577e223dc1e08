"""What the command line sets for one run of `windfarm up`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.config import Environment
from services.environment import public_address
from services.ray_config import RayConfig


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line may set for one run. `None`: as the file says."""

    home: Path
    config: RayConfig
    host: str | None = None
    port: int | None = None
    threads: int | None = None
    num_local_nodes: int = 1
    """More than one: that many nodes of Ray on this machine, each with its share of cores and memory."""
    use_namespaces: bool | None = None
    """Whether those nodes get network namespaces; `None`: where that is possible."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of Ray's head, beside those that Ray finds by itself."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the public endpoint."""
        return self.address[0] in ("127.0.0.1", "::1", "localhost")

    @property
    def address(self) -> tuple[str, int]:
        environment = Environment(
            home=self.home,
            database_url="",
            internal_secret="",
            listen_host=self.host,
            listen_port=self.port,
            threads=self.threads,
        )
        return public_address(self.config.app.platform.listen, environment)
