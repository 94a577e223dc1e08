"""What our code logs in a replica reaches the file that Serve keeps for it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from services.replica_log import log_into_replica_file


@pytest.fixture
def untouched_loggers() -> Iterator[None]:
    names = ("ray.serve", "windfarm", "services", "cluster", "rag")
    before = {name: (logger.handlers[:], logger.level, logger.propagate) for name in names if (logger := _logger(name))}
    yield
    for name, (handlers, level, propagate) in before.items():
        logger = _logger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


@pytest.mark.usefixtures("untouched_loggers")
def test_requests_and_failures_are_found_in_the_replicas_log(tmp_path: Path) -> None:
    configure_component_logger(
        component_name="platform_Gateway",
        component_id="abc",
        logging_config=LoggingConfig(logs_dir=str(tmp_path)),
        max_bytes=1 << 20,
        backup_count=1,
    )
    log_into_replica_file()
    _logger("windfarm.access").info("req_1 GET /v1/models 200")
    _logger("services.gateway_app").error("Request req_2 failed")
    for handler in _logger("ray.serve").handlers:
        handler.flush()
    text = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "INFO" in text and "req_1 GET /v1/models 200" in text
    assert "ERROR" in text and "Request req_2 failed" in text
