"""The loop: exact resume, signals, faults, data order and the run folder."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_depth import checkpoint, cli
from dino_depth.config import HealthConfig, PretrainConfig, save_config
from dino_depth.errors import ConfigError, DataError, GateError, Interrupted, ReportedError
from dino_depth.pretrain import loading, student_teacher, train
from dino_depth.pretrain.health import CollapseGate, measure, rankme
from dino_depth.pretrain.in_loop import choose_checkpoint
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.pretrain.student_teacher import Targets
from dino_depth.pretrain.train import pretrain
from dino_depth.shards import DepthShards

ROOT = Path(__file__).resolve().parents[1]


def copy(config: PretrainConfig, out: Path | str, **groups) -> PretrainConfig:
    """The configuration with another run folder and, per group, changed settings."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, out=str(out), **changed)


def final_state(run) -> dict:
    return checkpoint.load(checkpoint.checkpoints(Path(run))[-1])


def assert_same(first: dict, second: dict, path: str = ""):
    assert first.keys() == second.keys(), path
    for key, value in first.items():
        where = f"{path}/{key}"
        if isinstance(value, dict):
            assert_same(value, second[key], where)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), where
        else:
            assert value == second[key], where


def stopped_and_resumed(config: PretrainConfig, monkeypatch):
    """A run that ends in its fifth step and goes on from there."""
    losses, calls = student_teacher.student_losses, []

    def stop_in_the_fifth(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted("stopped")
        return losses(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(student_teacher, "student_losses", stop_in_the_fifth)
        with pytest.raises(Interrupted):
            pretrain(config)
    pretrain(dataclasses.replace(config, resume=True))


@pytest.fixture
def uninterrupted(tiny, tmp_path) -> dict:
    pretrain(copy(tiny, tmp_path / "whole"))
    return final_state(tmp_path / "whole")


def command(config: PretrainConfig, folder: Path, *more: str) -> list[str]:
    save_config(config, folder / "config_in.yaml")
    return [sys.executable, "-m", "dino_depth.cli", "pretrain", "--config", str(folder / "config_in.yaml"), *more]


def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(tiny, tmp_path, uninterrupted):
    """SIGKILL before the first checkpoint, right after one, between two and while one is written; with workers."""
    config = copy(tiny, tmp_path / "killed", data={"workers": 2})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = tmp_path / "killed"
    moments = [
        lambda: (run / "config.yaml").is_file(),
        lambda: checkpoint.checkpoint_path(run, 2).is_file(),
        lambda: any(run.glob("checkpoints/*.tmp")) or checkpoint.checkpoint_path(run, 4).is_file(),
        lambda: '"step": 5' in (run / "metrics.jsonl").read_text(),
    ]
    for moment in moments:
        process = subprocess.Popen(
            command(config, tmp_path, "--resume"), env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        give_up = time.monotonic() + 120
        while process.poll() is None and not (run.is_dir() and _holds(moment)) and time.monotonic() < give_up:
            time.sleep(0.002)
        process.kill()
        process.communicate()
    done = subprocess.run(
        command(config, tmp_path, "--resume"), env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert_same(final_state(run), uninterrupted)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def _holds(moment) -> bool:
    try:
        return moment()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_the_run_continues_exactly(tiny, uninterrupted, monkeypatch, number):
    losses, calls = student_teacher.student_losses, []

    def interrupt_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return losses(*arguments)

    monkeypatch.setattr(student_teacher, "student_losses", interrupt_third)
    with pytest.raises(Interrupted, match=f"step 3 by {signal.Signals(number).name}"):
        pretrain(tiny)
    assert final_state(tiny.out)["step"] == 3
    pretrain(dataclasses.replace(tiny, resume=True))
    assert_same(final_state(tiny.out), uninterrupted)


def test_exit_code_75(tiny, tmp_path):
    process = subprocess.Popen(
        command(copy(tiny, tiny.out, train={"steps": 100000}), tmp_path),
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not _holds(lambda: '"step": 2' in Path(tiny.out, "metrics.jsonl").read_text()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "continue with --resume" in error.splitlines()[-1]


def test_workers_and_residency_change_nothing(tiny, tmp_path, uninterrupted):
    pretrain(copy(tiny, tmp_path / "workers", data={"workers": 3, "resident": True}))
    assert_same(final_state(tmp_path / "workers"), uninterrupted)


def test_another_seed_changes_everything(tiny, tmp_path, uninterrupted):
    pretrain(copy(tiny, tmp_path / "seed", train={"seed": 1}))
    other = final_state(tmp_path / "seed")["teacher"]
    assert not torch.equal(other["backbone.norm.weight"], uninterrupted["teacher"]["backbone.norm.weight"])


@pytest.mark.parametrize("batch, passes, ranks", [(8, 1, 1), (8, 2, 2), (12, 3, 1)])
def test_every_sample_once_per_epoch_whoever_reads_it(tiny, monkeypatch, batch, passes, ranks):
    config = copy(tiny, "run", train={"batch": batch, "accumulate": passes, "steps": 30})
    monkeypatch.setattr(loading.distributed, "world_size", lambda: ranks)
    seen = [[] for _ in range(config.train.steps)]
    for rank in range(ranks):
        monkeypatch.setattr(loading.distributed, "rank", lambda rank=rank: rank)
        for turn, positions in enumerate(loading.positions(config, 0)):
            seen[turn // passes] += positions
    assert [sorted(step) for step in seen] == [list(range(s * batch, (s + 1) * batch)) for s in range(30)]
    order = EndlessOrder([{}] * 60, config.data, config.train.seed)
    epochs = [[order[position] for position in range(60 * epoch, 60 * epoch + 60)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs) and epochs[0] != epochs[1]


def test_accumulated_gradients_are_the_mean_over_passes(tiny, tmp_path, monkeypatch):
    """Two passes of 4 maps move the weights as the mean of the two passes' gradients would."""
    gradients = []
    monkeypatch.setattr(train, "clip", lambda student, largest: _record(student, gradients))
    once = copy(tiny, tmp_path / "one", train={"steps": 1, "batch": 4}, model={"drop_path": 0.0})
    pretrain(once)
    monkeypatch.setattr(loading, "positions", lambda config, first: [[4, 5, 6, 7]])
    pretrain(copy(once, tmp_path / "two"))
    monkeypatch.undo()
    monkeypatch.setattr(train, "clip", lambda student, largest: _record(student, gradients))
    pretrain(copy(once, tmp_path / "both", train={"batch": 8, "accumulate": 2}))
    first, second, both = gradients
    for a, b, mean in zip(first, second, both, strict=True):
        assert torch.allclose((a + b) / 2, mean, rtol=1e-4, atol=1e-6)


def _record(student, gradients) -> torch.Tensor:
    gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    return torch.zeros(3)


def _poison(monkeypatch, steps):
    """Makes the loss NaN at the given calls."""
    losses, calls = student_teacher.student_losses, []

    def broken(*arguments):
        calls.append(1)
        result = losses(*arguments)
        if len(calls) - 1 in steps:
            result["loss"] = result["loss"] * float("nan")
        return result

    monkeypatch.setattr(student_teacher, "student_losses", broken)


def test_one_loss_that_is_not_finite_is_skipped(tiny, monkeypatch):
    _poison(monkeypatch, {3, 5})
    pretrain(tiny)
    state = final_state(tiny.out)
    assert all(torch.isfinite(value).all() for value in state["student"].values())
    assert {float(slot["step"]) for slot in state["optimizer"]["state"].values()} == {6.0}
    assert "step 3 skipped" in Path(tiny.out, "run.log").read_text()


def test_three_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tiny, monkeypatch):
    _poison(monkeypatch, {4, 5, 6})
    with pytest.raises(ReportedError, match=r"step 6: .*step-00000004\.pt") as error:
        pretrain(tiny)
    assert error.value.exit_code == 1
    assert all(torch.isfinite(value).all() for value in final_state(tiny.out)["student"].values())


@pytest.mark.parametrize("poisoned, last_good", [({4, 5, 6}, 4), ({2, 3, 4}, 2)])
def test_steps_between_logged_ones_are_judged_too(tiny, monkeypatch, poisoned, last_good):
    """A step is looked at when the next one is queued, or where something is written."""
    _poison(monkeypatch, poisoned | {0})
    config = copy(tiny, tiny.out, train={"log_every": 100}, health={"every": 100})
    where = rf"step-{last_good:08d}\.pt"
    with pytest.raises(ReportedError, match=f"step {max(poisoned)}: loss not finite 3 times in a row; .*{where}"):
        pretrain(config)
    log = Path(tiny.out, "run.log").read_text()
    assert [int(number) for number in re.findall(r"step (\d+) skipped: loss nan", log)] == sorted(poisoned | {0})


def test_what_is_logged_changes_nothing(tiny, tmp_path, uninterrupted):
    seldom = {"log_every": 5, "checkpoint_every": 3}
    pretrain(copy(tiny, tmp_path / "seldom", train=seldom))
    assert_same(final_state(tmp_path / "seldom"), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_at_once(tiny, monkeypatch, uninterrupted, number):
    make_loader = train.make_loader
    monkeypatch.setattr(train, "make_loader", lambda *arguments: signal.raise_signal(number))
    with pytest.raises(Interrupted, match=f"before the first step by {signal.Signals(number).name}"):
        pretrain(tiny)
    assert not checkpoint.checkpoints(Path(tiny.out))
    monkeypatch.setattr(train, "make_loader", make_loader)
    pretrain(dataclasses.replace(tiny, resume=True))
    assert_same(final_state(tiny.out), uninterrupted)


def test_bad_steps_survive_a_restart(tiny, monkeypatch):
    """Checkpointing between the first and the third bad step must not reset the count."""
    _poison(monkeypatch, {2, 3, 4})
    monkeypatch.setattr(train, "BAD_STEPS", 99)
    pretrain(copy(tiny, tiny.out, train={"steps": 4}))
    assert final_state(tiny.out)["bad"] == 2


def test_run_folder(tiny, tmp_path):
    pretrain(tiny)
    run = Path(tiny.out)
    assert {"config.yaml", "env.json", "run.log", "metrics.jsonl", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert list(run.glob("events.out.tfevents*"))
    assert [path.name for path in checkpoint.checkpoints(run)] == [f"step-{s:08d}.pt" for s in (4, 6, 8)]
    assert "started at step 0 of 8 on cpu, float32 products" in (run / "run.log").read_text()
    environment = json.loads((run / "env.json").read_text())
    assert environment["samples"] == 60 and environment["packages"]["torch"] == torch.__version__.split("+")[0]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "loss/dino", "loss/ibot", "loss/koleo", "schedule/lr", "gradient/backbone"} <= line.keys()
    assert {"health/class_target_entropy", "health/class_mean_entropy", "health/class_used"} <= line.keys()
    assert all(np.isfinite(value) for value in line.values())
    with pytest.raises(ConfigError, match="not empty.*--resume"):
        pretrain(tiny)
    with pytest.raises(ConfigError, match=r"--resume: optim\.lr was 0\.0113 .* 0\.5 now"):
        pretrain(dataclasses.replace(copy(tiny, run, optim={"lr": 0.5}), resume=True))
    before = (run / "metrics.jsonl").read_text()
    pretrain(dataclasses.replace(tiny, resume=True))  # nothing left to do
    assert (run / "metrics.jsonl").read_text() == before


def test_resume_refuses_other_samples(tiny):
    pretrain(copy(tiny, tiny.out, data={"splits": ["train"]}))
    environment = Path(tiny.out, "env.json")
    environment.write_text(environment.read_text().replace('"samples_sha256": "', '"samples_sha256": "0'))
    with pytest.raises(DataError, match="samples of .* are not those"):
        pretrain(dataclasses.replace(tiny, resume=True))


def test_init_from_starts_a_new_run_with_the_weights(tiny, tmp_path):
    pretrain(tiny)
    teacher = final_state(tiny.out)["teacher"]
    for source in (tiny.out, str(checkpoint.checkpoints(Path(tiny.out))[-1])):
        out = tmp_path / f"next{Path(source).suffix}"
        new = copy(tiny, out, train={"steps": 1}, optim={"warmup": 5})  # the first step's learning rate is 0
        pretrain(dataclasses.replace(new, init_from=source))
        student = final_state(out)["student"]
        assert torch.equal(student["backbone.patch_embed.proj.weight"], teacher["backbone.patch_embed.proj.weight"])
        assert torch.equal(student["backbone.pos_embed"], teacher["backbone.pos_embed"])
    wide = dataclasses.replace(copy(tiny, tmp_path / "wide", model={"dim": 64}), init_from=tiny.out)
    with pytest.raises(ConfigError, match="init_from"):
        pretrain(wide)


@pytest.mark.parametrize(
    "groups, text",
    [
        ({"train": {"batch": 1000}}, "60 samples are too few"),
        ({"train": {"batch": 9, "accumulate": 2}}, "must divide"),
        ({"train": {"batch": 1}}, "KoLeo"),
        ({"train": {"steps": 0}}, "at least 1"),
        ({"crops": {"global_size": 50}}, "global_size"),
        ({"crops": {"local_scale": (0.5, 0.2)}}, "local_scale"),
        ({"data": {"splits": ["traim"]}}, r"no sample of splits \['traim'\]; found \['test', 'train'\]"),
        ({"data": {"shards": ""}}, "data.shards"),
        ({"model": {"attention": "varlen"}}, "attention varlen does not work here"),
        ({"train": {"device": "cuda"}}, "no CUDA device"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tiny, groups, text):
    if torch.cuda.is_available() and "device" in str(groups):
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=text):
        pretrain(copy(tiny, tiny.out, **groups))
    assert not Path(tiny.out).exists()


def damaged(shards: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_named_in_one_line(tiny, shards, tmp_path, workers):
    folder = damaged(shards, tmp_path)
    reader = DepthShards(str(folder), ["train"])
    path, png = reader.path(7), reader.png(7)
    path.write_bytes(path.read_bytes().replace(png, png[:40] + bytes(len(png) - 40)))
    with pytest.raises(DataError, match=f"{path.name}: sample {reader.key(7)}") as error:
        pretrain(copy(tiny, tiny.out, data={"shards": str(folder), "workers": workers}))
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_shards_that_are_missing_short_or_undescribed(tiny, shards, tmp_path):
    folder = damaged(shards, tmp_path)
    shard = sorted(folder.glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{shard.name}: {len(whole) // 2} bytes, the manifest says {len(whole)}"):
        DepthShards(str(folder))
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: missing"):
        DepthShards(str(folder))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is not JSON"):
        DepthShards(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        DepthShards(str(folder))


def test_indexed_samples_equal_those_of_webdataset(shards):
    import webdataset

    reader = DepthShards(str(shards))
    stock = webdataset.WebDataset([str(path) for path in reader.paths], shardshuffle=False)
    for index, sample in enumerate(stock):
        assert sample["depth.png"] == reader.png(index) and sample["__key__"] == reader.key(index)
    assert index + 1 == len(reader) == 84


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tiny):
    """The limit on a file's size stands in for the disk's: the write itself fails, inside torch.save."""
    pretrain(copy(tiny, tiny.out, train={"steps": 2}))
    before = {path.name: path.read_bytes() for path in Path(tiny.out, "checkpoints").iterdir()}
    state = final_state(tiny.out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="step-00000003") as error:
            checkpoint.save(state, checkpoint.checkpoint_path(Path(tiny.out), 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in Path(tiny.out, "checkpoints").iterdir()} == before


def test_pruning_leaves_what_another_process_is_writing(tiny, tmp_path):
    """Also on another machine: its file has another name, and its lock says that it is at it."""
    pretrain(copy(tiny, tiny.out, train={"steps": 1}))
    state, folder = final_state(tiny.out), Path(tiny.out, "checkpoints")
    left, busy = folder / "step-00000007.elsewhere.1.tmp", []
    left.write_bytes(b"of a killed process")
    save = torch.save

    def other_saves(state, file):
        busy.append(Path(file.name))
        checkpoint.prune(Path(tiny.out), 1)
        assert busy[0].exists() and not left.exists()
        save(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", other_saves)
        checkpoint.save(state, checkpoint.checkpoint_path(Path(tiny.out), 9))
    assert busy[0].name.startswith("step-00000009.") and str(os.getpid()) in busy[0].name
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001.pt", "step-00000009.pt"]
    assert checkpoint.load(folder / "step-00000009.pt")["step"] == state["step"]
    checkpoint.prune(Path(tiny.out), 1)
    assert [path.name for path in folder.iterdir()] == ["step-00000009.pt"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, capfd, caplog):
    pretrain(copy(tiny, tiny.out, train={"steps": 4, "checkpoint_every": 2, "keep": 2}))
    older, newest = checkpoint.checkpoints(Path(tiny.out))
    whole = final_state(tiny.out)
    newest.write_bytes(newest.read_bytes()[:2000])
    path, state = checkpoint.newest(Path(tiny.out))
    assert path == older and state["step"] == 2 and f"{newest}: unreadable checkpoint" in caplog.text
    assert choose_checkpoint(tiny.out, "last")[0] == older
    capfd.readouterr()
    resumed = copy(tiny, tiny.out, train={"steps": 4, "checkpoint_every": 2, "keep": 2})
    pretrain(dataclasses.replace(resumed, resume=True))
    assert_same(final_state(tiny.out), whole)
    said = f"{newest}: unreadable checkpoint: 2000 bytes that are no zip archive, cut short or damaged; an older"
    assert said in capfd.readouterr().err and said in Path(tiny.out, "run.log").read_text()
    newest.write_bytes(b"")
    pretrain(dataclasses.replace(copy(tiny, tmp_path / "new", train={"steps": 1}), init_from=tiny.out))
    assert f"{newest}: unreadable checkpoint: the file is empty; an older" in capfd.readouterr().err
    older.write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"{newest.name}: unreadable .* none of 2 checkpoints can be read"):
        checkpoint.newest(Path(tiny.out))
    assert capfd.readouterr().err == ""


def test_no_flipped_bit_of_a_checkpoint_becomes_a_weight(tiny, tmp_path):
    pretrain(copy(tiny, tiny.out, train={"steps": 1}))
    whole = checkpoint.checkpoint_path(tiny.out, 1).read_bytes()
    expected = checkpoint.load(checkpoint.checkpoint_path(tiny.out, 1))
    random, path, refused = np.random.default_rng(0), tmp_path / "step-00000001.pt", 0
    places = [*range(0, 400, 9), *random.integers(0, len(whole), 60), *(len(whole) - 1 - random.integers(0, 9999, 60))]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}: unreadable checkpoint: ") and len(str(error)) < 300
        else:  # between the parts of the archive
            assert_same(found, expected)
    assert refused > 60


def test_resume_takes_both_spellings_of_an_option(tiny, capsys):
    pretrain(copy(tiny, tiny.out, train={"steps": 1}))
    for words in (["--out", str(tiny.out)], [f"--out={tiny.out}"]):
        assert cli.main(["pretrain", "--resume", *words]) == 0, capsys.readouterr().err


def test_a_warm_up_that_was_set_for_a_longer_run_is_told(tiny):
    pretrain(copy(tiny, tiny.out, train={"steps": 2}, optim={"warmup": 2}))
    assert "optim.warmup is 2 of train.steps 2" in Path(tiny.out, "run.log").read_text()


def test_checkpoints_are_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"step": 1, "teacher": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil\.pt: unreadable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "short.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"short\.pt"):
        checkpoint.load(tmp_path / "short.pt")


def collapsing(tiny: PretrainConfig, **loss) -> PretrainConfig:
    """Enough steps and a gate armed early, so that a fault shows in seconds."""
    config = copy(tiny, tiny.out, loss=loss, model={"drop_path": 0.0}, train={"steps": 160, "checkpoint_every": 1000})
    return dataclasses.replace(config, health=dataclasses.replace(config.health, every=2, window=5))


def test_without_centering_the_run_collapses_and_the_gate_ends_it(tiny, tmp_path):
    config = collapsing(tiny, sinkhorn_iterations=0, koleo_weight=0.0)
    with pytest.raises(GateError, match="collapsed.*sinkhorn_iterations") as error:
        pretrain(config)
    assert error.value.exit_code == 4
    last = json.loads(Path(config.out, "metrics.jsonl").read_text().splitlines()[-1])
    assert last["health/class_mean_entropy"] < 0.5
    assert "collapsed" in Path(config.out, "run.log").read_text()


def test_a_soft_stall_ends_the_run(tiny):
    config = collapsing(tiny, teacher_temperature=0.5, teacher_temperature_start=0.5)
    with pytest.raises(GateError, match="stalled.*teacher_temperature"):
        pretrain(config)


HEALTHY = {"class_mean_entropy": 0.97, "class_target_entropy": 0.7, "class_used": 0.6}


def fed(steps: int, **figures) -> int | None:
    """The step at which a gate over 100 steps stops a run with these figures."""
    gate = CollapseGate(HealthConfig(every=1, window=5, grace=0.5), 100)
    for step in range(1, steps + 1):
        try:
            gate.check(HEALTHY | figures, step)
        except GateError:
            return step
    return None


def test_the_gate_waits_and_forgives_what_it_should():
    assert fed(100) is None
    assert fed(100, class_mean_entropy=0.1) == 5  # a hard collapse at once, when the window is full
    assert fed(100, class_target_entropy=0.99) == 50  # a stall after the grace period
    assert fed(100, class_used=0.01) == 50
    gate = CollapseGate(HealthConfig(every=1, window=5, grace=0.0), 100)
    for step in range(40):
        gate.check(HEALTHY | {"class_target_entropy": 1.0 if step % 5 == 0 else 0.8}, step)


def test_health_figures_equal_their_definitions():
    classes, patches = torch.rand(6, 9).softmax(1), torch.rand(4, 9).softmax(1)
    features = torch.randn(6, 5)
    figures = measure(Targets(classes, patches, features, torch.randn(4, 5)))

    def entropy(p):
        return -sum(x * math.log(x) for x in p.tolist())

    expected = sum(entropy(row) for row in classes) / 6 / math.log(9)
    assert figures["class_target_entropy"] == pytest.approx(expected, rel=1e-5)
    assert figures["patch_mean_entropy"] == pytest.approx(entropy(patches.mean(0)) / math.log(9), rel=1e-5)
    assert figures["class_used"] == pytest.approx(len(set(classes.argmax(1).tolist())) / 6)
    unit = torch.nn.functional.normalize(features, dim=1)
    cosines = [float(unit[i] @ unit[j]) for i in range(6) for j in range(6) if i != j]
    assert figures["class_cosine"] == pytest.approx(sum(cosines) / 30, abs=1e-5)
    fewer = measure(Targets(classes, patches, features, torch.randn(4, 5)), spectra=False)
    assert figures.keys() - fewer.keys() == {"class_rankme", "patch_rankme"}
    assert rankme(torch.eye(8)) == pytest.approx(8, rel=1e-3)
    assert rankme(torch.ones(8, 8)) == pytest.approx(1, rel=1e-3)
