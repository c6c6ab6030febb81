"""Chapter 6's engine under Ray Serve: deployed by its config, asked, left, scaled and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
import yaml

from ch06_vllm import load
from ch06_vllm.client import Client
from ch06_vllm.engine.request import Config
from ch07_sglang_routing import ray_local, ray_scaling, ray_serve
from common import process
from common.ranks import free_port
from common.script import UserError

CONFIG = Path(__file__).resolve().parents[1] / "ch07_sglang_routing/configs/ray_serve.yaml"
BLOCKS = 512
# Ray's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field"),
    pytest.mark.filterwarnings("ignore:Tip"),
]


def config() -> dict:
    return yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def unknown_fields(config: dict) -> list[str]:
    """What of a Serve config its classes have no field for, and so nobody reads."""
    from ray.serve import config as of
    from ray.serve import schema

    (app,) = config["applications"]
    pairs = [(config, schema.ServeDeploySchema), (config["http_options"], schema.HTTPOptionsSchema)]
    pairs += [(app, schema.ServeApplicationSchema)]
    for deployment in app["deployments"]:
        pairs += [(deployment, schema.DeploymentSchema), (deployment["autoscaling_config"], of.AutoscalingConfig)]
        pairs += [(deployment["ray_actor_options"], schema.RayActorOptionsSchema)]
    return [name for told, kind in pairs for name in told if name not in kind.model_fields]


def test_the_config_is_one_by_serves_own_schema_and_fits_the_application() -> None:
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    from ch07_sglang_routing import ray_app

    found = ServeDeploySchema.model_validate(config())
    (app,) = found.applications
    module, _, builder = app.import_path.partition(":")
    assert getattr(sys.modules[module], builder) is ray_app.build
    assert [each.name for each in app.deployments] == [ray_app.Replica.name] == [ray_local.DEPLOYMENT]
    assert app.name == ray_local.APP
    assert ray_app.build(app.args | {"model": "nano"})  # its own model would be made
    AutoscalingConfig(**app.deployments[0].autoscaling_config)
    assert not unknown_fields(config())
    wrong = config()
    deployment = wrong["applications"][0]["deployments"][0]
    deployment["max_ongoing_request"] = deployment["autoscaling_config"]["max_replica"] = 4
    ServeDeploySchema.model_validate(wrong)  # it lets what it does not know pass: hence unknown_fields
    assert unknown_fields(wrong) == ["max_ongoing_request", "max_replica"]
    deployment["max_ongoing_requests"] = "many"
    with pytest.raises(ValidationError, match="max_ongoing_requests"):
        ServeDeploySchema.model_validate(wrong)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [("/no/such/model", {}, "no model folder"), ("nano", {"no-such-flag": 1}, "no-such-flag"),
     ("nano", {"max-num-seqs": 0}, "max-num-seqs")],
)  # fmt: skip
def test_what_cannot_be_deployed_is_one_line_before_anything_starts(model: str, settings: dict, said: str) -> None:
    from ch07_sglang_routing import ray_app

    with pytest.raises(UserError, match=said):
        ray_app.build({"model": model, "settings": settings})


def test_without_a_cluster_at_the_address_it_is_one_line() -> None:
    for address in ("127.0.0.1:1", "auto", "host:port"):
        with pytest.raises(UserError, match="no Ray cluster answers at"), ray_local.cluster(2, address):
            pass


DRIVER = """
import os, signal
from ch07_sglang_routing import ray_local
with ray_local.cluster(1) as folder:
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_leaves_neither_processes_nor_files_of_ray() -> None:
    mark = "TEST_RAY_DRIVER"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=CONFIG.parents[2], env={**os.environ, mark: "1"}, timeout=120,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("ray-")
    while left := process.marked(mark) or folder.exists():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The config as it stands, by `serve run` on a cluster of this test; only sizes and waits are a laptop's."""
    import ray

    from ch07_sglang_routing.ray_app import AUTOSCALING

    small, port = config(), free_port()
    small["http_options"] = {"host": "127.0.0.1", "port": port}
    (app,) = small["applications"]
    app["args"] = {"model": "nano", "settings": {"num-blocks": BLOCKS}}
    (deployment,) = app["deployments"]
    deployment["ray_actor_options"]["num_cpus"] = 1
    deployment["autoscaling_config"] |= AUTOSCALING
    file = tmp_path_factory.mktemp("serve") / "small.yaml"
    file.write_text(yaml.safe_dump(small))
    with ray_local.cluster(2):
        address = ray.get_runtime_context().gcs_address
        serve = [sys.executable, "-m", "ray.serve.scripts", "run", str(file), "--non-blocking", "--address", address]
        done = process.run(serve, timeout_s=120, env={"RAY_USAGE_STATS_ENABLED": "0"})
        assert done.returncode == 0, done.reason()
        asyncio.run(ray_local.until(lambda: ray_local.state() == "RUNNING", "the application runs", 120))
        yield f"http://127.0.0.1:{port}"
        children = ray_local.processes()
    assert children
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_replica_computes_on_the_cpu_also_where_a_gpu_is_visible(
    served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ch06_vllm.engine import engine
    from ch07_sglang_routing import ray_app

    class Stopped(Exception):
        pass

    seen = []

    def made(config: Config) -> None:
        seen.append(config.device)
        raise Stopped

    monkeypatch.setattr(engine, "Engine", made)
    replica = ray_app.Replica.func_or_class
    for settings in ({}, {"device": "cuda"}):
        with pytest.raises(Stopped):
            asyncio.run(replica.__init__(SimpleNamespace(), str(served_model), settings))
    assert seen == ["cpu", "cpu"]


def test_a_serve_that_does_not_drain_in_time_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    asked = []

    def slow(name: str) -> None:
        asked.append(name)
        raise TimeoutError

    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(ray_local, "deploy", lambda *_, **__: None)
    monkeypatch.setattr(serve, "delete", slow)
    with ray_local.deployed(None):
        pass
    assert asked == [ray_local.APP]


def test_completions_and_chat_by_the_openai_client(application: str) -> None:
    expected = ray_serve.without_serve("nano", BLOCKS, 12)
    greedy = {"model": "nano", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{application}/v1", api_key="none") as client:
        whole = [client.completions.create(prompt=prompt, **greedy) for prompt in ray_serve.PROMPTS]
        assert [answer.choices[0].text for answer in whole] == expected
        streams = [client.completions.create(prompt=prompt, stream=True, **greedy) for prompt in ray_serve.PROMPTS]
        chunks = [[chunk.choices[0].text for chunk in stream if chunk.choices] for stream in streams]
        assert ["".join(texts) for texts in chunks] == expected
        messages = [{"role": "user", "content": "hi"}]
        said = client.chat.completions.create(messages=messages, **greedy)
        stream = client.chat.completions.create(messages=messages, stream=True, **greedy)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert said.choices[0].message.content == text
        assert said.usage.completion_tokens == 12
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="model's context"):
            client.completions.create(model="nano", prompt="x", max_tokens=10**6)


def test_the_first_token_comes_before_the_last_is_made(application: str) -> None:
    async def first_and_left() -> tuple[float, float]:
        async with Client(application) as client:
            body = {"model": "nano", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
            async with client.stream("/v1/completions", body) as chunks:
                async for _ in chunks:
                    return await asyncio.to_thread(ray_serve.gauges, application)
        raise AssertionError

    running, used = asyncio.run(first_and_left())
    assert running == 1
    assert used > 0


def test_a_client_that_leaves_frees_its_blocks(application: str) -> None:
    async def left() -> tuple[float, float, float]:
        async with Client(application) as client:
            return await ray_serve.leave(client, application, "nano")

    during, running, after = asyncio.run(left())
    assert during > 0.01
    assert running == after == 0


def test_nothing_is_lost_while_replicas_come_go_and_are_killed(application: str, served_model: Path) -> None:
    rng = load.np.random.default_rng(0)
    requests = load.workload(load.usable_ids(served_model), [24] * 8, [16] * 8, rng)
    args = ray_scaling.parse_args(["--requests", "8"])
    users, seen, found = asyncio.run(ray_scaling.run(args, application, requests))
    figures = ray_scaling.figures(users.asked, found)
    assert found == {"killed": 1, "replicas_most": 2, "replicas_last": 1}
    assert figures["unstreamed_lost"] == figures["lost_while_scaling"] == 0
    assert figures["requests"] == figures["answered"] + figures["streams_cut"]
    assert figures["unstreamed"] >= 16
    ran = [row[3] for row in seen.rows]
    assert ran[0] == ran[-1] == 1
    assert max(ran) == 2


def test_users_tell_a_cut_stream_from_a_refused_one() -> None:
    from tests.openai_fake import Does, FakeServer

    with FakeServer() as server:
        server.script.extend([Does(after_tokens=1), Does(status=400), Does()])

        async def three() -> list[ray_scaling.Asked]:
            async with Client(server.url) as client:
                users = ray_scaling.Users(client, "fake", [load.Request([1, 2], 4)])
                users.set("only", 1)
                server.close_gate_at = 4
                while len(users.asked) < 4:
                    await asyncio.sleep(0.01)
                users.wanted = 0
                server.open_gate()
                await users.end()
                return users.asked

        asked = asyncio.run(three())
    assert [(one.streamed, one.outcome) for one in asked[:3]] == [(True, "cut"), (False, "failed"), (True, "answered")]
    assert "scripted 400" in asked[1].error
