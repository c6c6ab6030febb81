"""The Ray Serve application: replicas of chapter 6's engine behind Serve's proxy, as many as the queue asks for.

    serve run ch07_sglang_routing.ray_app:build model=nano          (on the cluster that RAY_ADDRESS names, or alone)
    serve deploy ch07_sglang_routing/configs/ray_serve.yaml         (the same on a cluster, by configuration)

Each replica is a process with an engine of its own and answers what chapter 6's server answers: /v1/completions,
/v1/chat/completions, /v1/models, /health, /metrics. Serve's proxy gives a request to the less busy of two replicas
drawn at random. What Serve does by itself, and what of it rests on the code here:

    replicas up and down   Serve: requests in flight / target_ongoing_requests, averaged over look_back_period_s
    graceful drain         Serve: a replica that goes gets nothing new and has graceful_shutdown_timeout_s to finish
    a client that leaves   Serve passes it on as http.disconnect; the service cancels, and the KV blocks are free
    a dead engine          check_health fails, and Serve starts another replica
    a killed replica       its requests get a 500 or a broken stream from the proxy: Serve asks no other replica, so a
                           client has to (ch06_vllm.client does, and so does openai's)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from ch06_vllm.servers import check_model, flags
from ch06_vllm.started import folder_of

# What a demonstration has the time for. By itself Serve hears of a queue every 10 s (metrics_interval_s), averages over
# 30 s, waits 30 s before it scales up and 600 s before it scales down.
AUTOSCALING = {
    "metrics_interval_s": 0.5,
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 4,
    "look_back_period_s": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 4,
}


class Arguments(BaseModel):
    """Of the application. `model`: a preset (made on each node, the same bytes) or a folder that every node has.

    `settings`: flags of ch06_vllm.engine.server without the dashes, as max-num-seqs.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "nano"
    settings: dict[str, Any] = {}


@serve.deployment(
    name="Engine",
    autoscaling_config=AUTOSCALING,
    max_ongoing_requests=64,  # of one replica; what is beyond waits in the proxy
    graceful_shutdown_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=2,
    ray_actor_options={"num_cpus": 1},  # torch gets as many threads
)
@serve.ingress()
class Replica:
    """One engine, and the routes of chapter 6's server on it."""

    async def __init__(self, model: str, settings: dict[str, Any]) -> None:
        from ch06_vllm.engine.api import Service
        from ch06_vllm.engine.async_engine import AsyncEngine
        from ch06_vllm.engine.engine import Engine
        from ch06_vllm.engine.server import parse_args

        folder = str(folder_of(model))
        check_model(folder)
        own = {"served-model-name": Path(model).name, "device": "cpu"}  # Ray leaves a node's GPUs visible to it
        args, config = parse_args(["--model", folder, *flags(settings | own)])
        self.engine = AsyncEngine(Engine(config), args.served_model_name)
        self.engine.start()
        self.service = Service(self.engine, args)

    def __serve_build_asgi_app__(self) -> Any:
        return self.service.app()

    async def check_health(self) -> None:
        if self.engine.dead:
            raise RuntimeError(self.engine.dead)

    async def __del__(self) -> None:  # Serve calls it when the replica has drained
        await self.engine.stop()


def application(args: Arguments, **options: Any) -> Application:
    """`options`: of the deployment, beside those above.

    Raises:
        UserError: there is no such model, or no such setting.
    """
    from ch06_vllm.engine.server import parse_args

    folder = str(folder_of(args.model))
    check_model(folder)
    parse_args(["--model", folder, *flags(args.settings)])
    deployment: Any = Replica
    return deployment.options(**options).bind(args.model, args.settings)


def build(args: dict[str, Any]) -> Application:
    """What `serve run` and a Serve config import: they pass a dictionary and take no second parameter."""
    return application(Arguments(**args))
