"""The record of a replica that is none of windfarm's own processes, as model servers announce themselves."""

from __future__ import annotations

import os
from dataclasses import asdict

from cluster.engine import ModelInfo
from services.discovery import ReplicaEndpoint


def endpoint_of(model: str, url: str, num_slots: int) -> ReplicaEndpoint:
    info = ModelInfo(model, "noop", max_context=4096, max_concurrency=num_slots, continues_answers=True)
    return ReplicaEndpoint(f"{model}-0", f"llm-{model}", url, os.getpid(), model, info=asdict(info))
