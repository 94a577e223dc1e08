"""Ray Serve LLM's OpenAI application as it comes, on a Ray of its own, until the process is ended.

`python -m tests.bench.ray_serve_llm JSON` with `model` (a folder), `name`, `port` and vLLM's `options`. Only shares of
CPUs are given, because its defaults ask for more cores than small machines have.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def main(model: str, name: str, port: int, options: dict[str, Any]) -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        engine_kwargs=options,
        accelerator_config={"kind": "cpu"},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        runtime_env={"env_vars": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "VLLM_PLUGINS")}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
