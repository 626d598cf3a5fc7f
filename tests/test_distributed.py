"""Several ranks over gloo compute what one process computes, and say which of them is missing and why."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters

from dino_depth import checkpoint, compiled, distributed
from dino_depth.config import PretrainConfig, save_config
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError
from dino_depth.pretrain import loading, student_teacher, train
from dino_depth.pretrain.losses import koleo, sinkhorn
from dino_depth.pretrain.train import pretrain

ROOT = Path(__file__).resolve().parents[1]
# A server that has imported the program forks the ranks, without pytest's threads and in milliseconds.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["dino_depth.pretrain.train"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, world: int, port: int, folder: str, function, arguments: tuple):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        result, code = function(*arguments), 0
    except ReportedError as error:
        result, code = str(error), error.exit_code
    except BaseException:
        result, code = traceback.format_exc(), -1
    torch.save((code, result), f"{folder}/rank{rank}.pt")


def run_ranks(world: int, folder: Path, function, *arguments, patience: float = 120) -> list[tuple]:
    """Exit code and result, or message, of each rank; None for one that never returned."""
    folder.mkdir(exist_ok=True)
    port = _free_port()
    processes = [
        RANKS.Process(target=_rank, args=(rank, world, port, str(folder), function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
    files = [folder / f"rank{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) if file.exists() else None for file in files]


def _losses(folder: str):
    distributed.start(torch.device("cpu"))
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    rows = data["logits"].split([5, 7])[distributed.rank()]
    features = data["features"].chunk(2)[distributed.rank()].clone().requires_grad_()
    loss = koleo(features)
    loss.backward()
    return {"targets": sinkhorn(rows, 0.05, 3), "loss": loss.detach(), "gradient": features.grad}


def test_sinkhorn_and_koleo_run_over_all_ranks(tmp_path):
    data = {"logits": torch.rand(12, 20) * 2 - 1, "features": torch.randn(8, 4)}
    torch.save(data, tmp_path / "data.pt")
    ranks = [result for _, result in run_ranks(2, tmp_path, _losses, str(tmp_path))]
    assert torch.allclose(torch.cat([rank["targets"] for rank in ranks]), sinkhorn(data["logits"], 0.05, 3), atol=1e-6)
    features = data["features"].requires_grad_()
    loss = koleo(features)
    loss.backward()
    assert all(rank["loss"].item() == pytest.approx(loss.item(), rel=1e-5) for rank in ranks)
    # Gradients are averaged over ranks afterwards, so each rank holds the whole gradient of its rows twice over.
    gathered = torch.cat([rank["gradient"] for rank in ranks]) / 2
    assert torch.allclose(gathered, features.grad, atol=1e-5)


def longer(tiny: PretrainConfig, out: Path, **settings) -> PretrainConfig:
    """Ten steps of 12 maps, with stochastic depth."""
    changed = dataclasses.replace(tiny.train, **{"steps": 10, "batch": 12, "checkpoint_every": 100} | settings)
    # At the demo's rate of learning Adam makes more than 1e-5 of differences in the last bits.
    optim = dataclasses.replace(tiny.optim, lr=4e-3)
    return dataclasses.replace(tiny, out=str(out), train=changed, optim=optim)


def assert_close(run: Path, reference: Path):
    """Losses of every step to 1e-5 and weights to 1e-4."""
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, reference)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == list(range(1, 11))
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "loss/dino", "loss/ibot"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (one["step"], name)
        # The distance of two near features cancels their first digits; its weight in the loss is 0.02.
        assert one["loss/koleo"] == pytest.approx(other["loss/koleo"], rel=1e-4), one["step"]
    states = [checkpoint.load(checkpoint.checkpoints(folder)[-1]) for folder in (run, reference)]
    for part in ("student", "teacher"):
        for name, value in states[1][part].items():
            found = states[0][part][name]
            if name.endswith("attn.qkv.bias"):
                # The loss does not depend on the keys' bias: its gradient is rounding, which Adam makes a full step.
                found, value = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (found, value))
            assert torch.allclose(found, value, atol=1e-4, rtol=0), f"{part}.{name}"


@pytest.fixture
def alone(tiny, tmp_path) -> Path:
    """The run of one process."""
    pretrain(longer(tiny, tmp_path / "alone"))
    return tmp_path / "alone"


def _noting_positions(config: PretrainConfig, folder: str, stop_at: int = -1):
    """Trains, and notes which positions this rank reads; rank 1 alone gets a signal in step ``stop_at``."""
    losses, steps, read = student_teacher.student_losses, [], loading.Passes.__getitem__

    def noted(self, places):
        with open(f"{folder}/positions-{os.environ['RANK']}.txt", "a") as file:
            file.writelines(f"{position}\n" for position, _ in places)
        return read(self, places)

    def disturbed(*arguments):
        steps.append(1)
        if len(steps) == stop_at + 1 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGUSR2)
        return losses(*arguments)

    loading.Passes.__getitem__, student_teacher.student_losses = noted, disturbed
    pretrain(config)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_the_weights_of_one(tiny, tmp_path, alone, world):
    ended = run_ranks(world, tmp_path / "ranks", _noting_positions, longer(tiny, tmp_path / "run"), str(tmp_path))
    assert ended == [(0, None)] * world
    assert_close(tmp_path / "run", alone)
    parts = [[int(line) for line in file.read_text().split()] for file in sorted(tmp_path.glob("positions-*.txt"))]
    assert [len(part) for part in parts] == [120 // world] * world
    assert sorted(position for part in parts for position in part) == list(range(120))


def _compiled(config: PretrainConfig, optimize_ddp: bool):
    """Trains compiled; graphs, breaks in them, and how many graphs torch looked for borders of buckets in."""
    looked, look = [], DDPOptimizer.compile_fn

    def noted(optimizer, graph, example):
        looked.append(graph)
        return look(optimizer, graph, example)

    @contextlib.contextmanager
    def compiling(enabled):
        with compiled.compiling(enabled, "aot_eager"):
            with torch._dynamo.config.patch(optimize_ddp=True) if optimize_ddp else contextlib.nullcontext():
                yield

    DDPOptimizer.compile_fn, train.compiling, train.probe_compiler = noted, compiling, lambda device: None
    pretrain(config)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), len(looked)


def test_compiled_ranks_train_the_weights_of_one_and_no_unit_is_cut_at_the_borders_of_buckets(tiny, tmp_path, alone):
    config = longer(tiny, tmp_path / "run", compile=True)
    ended = run_ranks(2, tmp_path / "ranks", _compiled, config, False, patience=400)
    assert [code for code, _ in ended] == [0, 0], ended
    for graphs, breaks, looked in (result for _, result in ended):
        assert 8 <= graphs <= 14 and breaks == looked == 0
    assert_close(tmp_path / "run", alone)
    config = longer(tiny, tmp_path / "cut", compile=True, steps=1)
    (_, (_, _, looked)), _ = run_ranks(2, tmp_path / "ranks", _compiled, config, True, patience=400)
    assert looked  # as torch would do it by itself


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_a_rank_says_from_the_start_which_gpu_is_its_own(monkeypatch, device, backend):
    """NCCL would otherwise guess it from the rank, and take memory on another's."""
    given, device = {}, torch.device(device)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *name, **options: given.update(options, name=name)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.start(device, timeout=30)
    distributed.stop()
    assert given["name"] == (backend,) and given["device_id"] == (device if backend == "nccl" else None)
    # A GPU's collectives are watched by the ranks themselves, before torch does.
    assert given["timeout"].total_seconds() == (90 if backend == "nccl" else 30)


def test_another_number_of_ranks_continues_the_run_exactly(tiny, tmp_path, alone):
    begun = longer(tiny, tmp_path / "begun")
    (tmp_path / "first").mkdir()
    ended = run_ranks(2, tmp_path / "ranks", _noting_positions, begun, str(tmp_path / "first"), 4)
    assert [code for code, _ in ended] == [Interrupted.exit_code] * 2
    assert "by another rank" in ended[0][1] and "by SIGUSR2" in ended[1][1]
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "begun")] == ["step-00000005.pt"]
    for world in (1, 3, 4):
        run, notes = tmp_path / f"run{world}", tmp_path / f"notes{world}"
        shutil.copytree(tmp_path / "begun", run)
        shutil.copytree(tmp_path / "first", notes)
        config = dataclasses.replace(begun, out=str(run), resume=True)
        assert run_ranks(world, tmp_path / "ranks", _noting_positions, config, str(notes)) == [(0, None)] * world
        assert_close(run, alone)
        read = sorted(int(line) for file in notes.glob("*.txt") for line in file.read_text().split())
        assert read == list(range(120)), f"{world} ranks lose or repeat maps"


def test_ranks_that_log_seldom_stop_after_the_step_in_which_one_was_asked_and_the_next(tiny, tmp_path):
    config = longer(tiny, tmp_path / "run", log_every=100)
    config = dataclasses.replace(config, health=dataclasses.replace(config.health, every=100))
    ended = run_ranks(2, tmp_path / "ranks", _noting_positions, config, str(tmp_path), 4)
    assert [code for code, _ in ended] == [Interrupted.exit_code] * 2
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000006.pt"]


def _disturbed(config: PretrainConfig, kind: str):
    """Trains; in step 3 something happens to rank 1."""
    losses, read, steps = student_teacher.student_losses, train.next_batch, []

    def loss(student, batch, targets, config):
        steps.append(1)
        if len(steps) == 4 and distributed.rank() == 0 and kind == "rank 0":
            raise DataError("shard-8.tar: sample 3 is cut short")
        if len(steps) == 4 and distributed.rank() == 1:
            if kind == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "own error":
                raise ReportedError("shard-7.tar: the disk is gone")
            if kind == "diverging":
                with torch.no_grad():
                    student.backbone.blocks[1].mlp.fc1.weight[3, 4] += 1e-6
        return losses(student, batch, targets, config)

    def next_batch(*arguments):
        if len(steps) == 3 and distributed.rank() == 1 and kind == "slow":
            time.sleep(12)
        return read(*arguments)

    student_teacher.student_losses, train.next_batch = loss, next_batch
    pretrain(config)


@pytest.mark.parametrize(
    "kind, code, message",
    [
        ("dead", 1, r"rank 1 \(.+\) does not answer; it was last seen in step 3, computing, \d+ s ago"),
        ("slow", 1, r"rank 1 \(.+\) does not answer; it was last seen in step 3, reading maps, \d+ s ago.*timeout 3 s"),
        ("own error", 1, r"rank 1 \(.+\) failed: shard-7.tar: the disk is gone"),
    ],
)
def test_the_others_name_the_rank_they_miss(tiny, tmp_path, kind, code, message):
    config = longer(tiny, tmp_path / "run", checkpoint_every=2, timeout=3.0)
    ended = run_ranks(3, tmp_path / "ranks", _disturbed, config, kind, patience=25)
    for rank in (0, 2):
        assert ended[rank][0] == code and re.search(message, ended[rank][1]), ended[rank]
    assert re.search(message, (tmp_path / "run" / "run.log").read_text())
    assert checkpoint.load(checkpoint.checkpoints(tmp_path / "run")[-1])["step"] == 2


def test_the_reason_of_the_rank_that_keeps_the_store_reaches_the_others(tiny, tmp_path):
    ended = run_ranks(3, tmp_path / "ranks", _disturbed, longer(tiny, tmp_path / "run"), "rank 0")
    assert [code for code, _ in ended] == [DataError.exit_code] * 3
    assert all(re.search(r"rank 0 \(.+\) failed: shard-8.tar: sample 3 is cut short", said) for _, said in ended[1:])


def test_a_rank_whose_weights_differ_is_named_and_nothing_of_it_is_saved(tiny, tmp_path):
    config = longer(tiny, tmp_path / "run", checkpoint_every=2)
    for code, message in run_ranks(3, tmp_path / "ranks", _disturbed, config, "diverging"):
        assert code == 1
        assert "rank 1 holds other weights than the rest after step 4, in student.backbone." in message
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000002.pt"]


def _alone_with_another_folder(config: PretrainConfig):
    if os.environ["RANK"] == "1":
        config = dataclasses.replace(config, out=config.out + "-elsewhere")
    pretrain(config)


def test_ranks_that_do_not_share_the_run_folder_are_refused(tiny, tmp_path):
    pretrain(longer(tiny, tmp_path / "run", steps=2))
    config = dataclasses.replace(longer(tiny, tmp_path / "run", steps=2), resume=True)
    for code, message in run_ranks(2, tmp_path / "ranks", _alone_with_another_folder, config):
        assert code == ConfigError.exit_code and re.search(r"rank 0 \(.+\) 2; rank 1 \(.+\) 0", message)


def test_processes_that_srun_started_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        distributed.start(torch.device("cpu"))


def test_a_rank_that_never_comes_is_one_line(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(_free_port()))
    with pytest.raises(ReportedError, match="rank 0: the ranks did not meet: .*1/2"):
        distributed.start(torch.device("cpu"), timeout=1.0)


def test_torchruns_agent_restarts_a_killed_rank_and_the_run_is_the_same(tiny, tmp_path):
    whole = longer(tiny, tmp_path / "whole", steps=40, checkpoint_every=5)
    assert run_ranks(2, tmp_path / "ranks", pretrain, whole) == [(0, None)] * 2
    config = dataclasses.replace(whole, out=str(tmp_path / "run"), resume=True)
    save_config(config, tmp_path / "config.yaml")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = subprocess.Popen(
        [*agent, "-m", "dino_depth.cli", "pretrain", "--config", str(tmp_path / "config.yaml")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not checkpoint.checkpoints(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"dino_depth.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert "exitcode: -9" in said or "exitcode  : -9" in said or "Signal 9" in said
    assert "resumed at step" in (tmp_path / "run" / "run.log").read_text()
    ended = [checkpoint.load(checkpoint.checkpoints(folder)[-1]) for folder in (tmp_path / "run", tmp_path / "whole")]
    for name, value in ended[1]["teacher"].items():
        assert torch.equal(ended[0]["teacher"][name], value), name
