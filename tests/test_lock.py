"""One writer: who holds a lock, who is refused, and what a killed or forked process leaves."""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dino_depth import lock
from dino_depth.cli import main
from dino_depth.config import save_config
from dino_depth.errors import ConfigError
from dino_depth.lock import EXCLUSIVE, SHARED, locked
from dino_depth.pretrain.run_folder import RunFolder
from dino_depth.pretrain.train import pretrain
from dino_depth.shards import DepthShards

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import os, sys, time
from pathlib import Path
from dino_depth.lock import EXCLUSIVE, locked
with locked(Path(sys.argv[1]), EXCLUSIVE, "busy", children_hold=sys.argv[2] == "True"):
    if os.fork() == 0:
        print("held", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def free(path: Path) -> bool:
    """Whether another process could lock the file that is at ``path`` now."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_one_holds_it_alone_or_several_share_it(tmp_path):
    path = tmp_path / "new" / "lock"
    with locked(path, EXCLUSIVE, "busy"):
        for kind in (EXCLUSIVE, SHARED):
            with pytest.raises(ConfigError, match="^held by me$"), locked(path, kind, "held by me"):
                pass
    with locked(path, SHARED, "busy"), locked(path, SHARED, "busy"):
        with pytest.raises(ConfigError), locked(path, EXCLUSIVE, "busy"):
            pass
        assert not free(path)
    assert free(path)


@pytest.mark.parametrize("made_anew", [False, True])
def test_the_lock_of_a_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch, made_anew):
    """Between opening the file and locking it, the holder may finish, and a third process begin."""
    path, calls = tmp_path / "lock", []

    def remove_first(descriptor, kind):
        if not calls:
            path.unlink()
            if made_anew:
                path.touch()
        calls.append(kind)
        fcntl_flock(descriptor, kind)

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(lock.fcntl, "flock", remove_first)
    with locked(path, EXCLUSIVE, "busy"):
        monkeypatch.undo()
        assert len(calls) == 2 and path.exists() and not free(path)


@pytest.mark.parametrize("children_hold", [False, True])
def test_a_killed_holder_leaves_the_lock_to_its_children_only_if_they_shall_have_it(tmp_path, children_hold):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, str(children_hold)],
        stdout=subprocess.PIPE, text=True, start_new_session=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n" and not free(path)
        holder.kill()
        holder.wait()
        assert free(path) != children_hold
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_patience_waits_for_a_holder_and_no_longer(tmp_path):
    path = tmp_path / "lock"
    with ExitStack() as held:
        held.enter_context(locked(path, EXCLUSIVE, "busy"))
        start = time.monotonic()
        with pytest.raises(ConfigError), locked(path, EXCLUSIVE, "busy", patience=0.6):
            pass
        assert 0.6 <= time.monotonic() - start < 10
        timer = threading.Timer(0.3, held.close)
        timer.start()
        with locked(path, EXCLUSIVE, "busy", patience=30):
            timer.join()
            assert not free(path)


def test_a_run_folder_has_one_writer(tiny, capsys):
    pretrain(tiny)
    before = {path.name: path.stat().st_mtime_ns for path in Path(tiny.out, "checkpoints").iterdir()}
    tiny.resume = True
    run = RunFolder(tiny, DepthShards.configured(tiny.data))
    with pytest.raises(ConfigError, match=f"--out {tiny.out}: another process is training in this folder"):
        pretrain(tiny)
    assert main(["pretrain", "--resume", f"--out={tiny.out}"]) == 2
    assert "another process is training" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in Path(tiny.out, "checkpoints").iterdir()} == before
    run.close()
    pretrain(tiny)
    log = logging.getLogger("dino_depth")  # whoever calls it from Python goes on with the logging that was set up
    assert log.propagate and not log.handlers


def test_a_requeued_job_waits_for_its_predecessor(tiny, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    shards = DepthShards.configured(tiny.data)
    first = RunFolder(tiny, shards)
    tiny.resume = True
    timer = threading.Timer(0.2, first._held.close)
    timer.start()
    second = RunFolder(tiny, shards)
    timer.join()
    second.close()


def test_of_two_that_begin_at_once_one_is_refused(tiny, monkeypatch):
    """The second looks at an empty folder, and locks it when the first has begun a run there and is gone again."""

    def after_the_other(*arguments, **options):
        save_config(tiny, Path(tiny.out, "config.yaml"))
        return locked(*arguments, **options)

    Path(tiny.out).mkdir()
    monkeypatch.setattr("dino_depth.pretrain.run_folder.locked", after_the_other)
    with pytest.raises(ConfigError, match="another process began a run in this folder"):
        RunFolder(tiny, DepthShards.configured(tiny.data))
    assert free(Path(tiny.out, ".lock"))
