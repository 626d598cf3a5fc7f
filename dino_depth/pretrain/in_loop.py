"""Probes of the teacher while it trains, by a process beside the loop that the loop never waits for.

    RUN/evaluations/step-00001000.pt     the teacher after 1000 steps, until it is measured
    RUN/evaluations/step-00001000.json   the result of ``dino-depth probe`` on it, or ``{"error": REASON}``
    RUN/checkpoints/best.pt              the teacher that measured best so far
    RUN/best.json                        its step, by which figure, with which value

The probe is a fresh Python process: CPU only, one thread, lowest priority. Teachers wait in line for it, so which steps
are measured depends on the step alone: 0, every multiple of ``train.evaluate_every``, and the last. What lies in the
folder is the whole state: a killed run measures on resume what has no result yet, and no step twice. Of equal values
the earlier step is the best, so a run that was killed names the same best as one that was not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import dino_depth
from dino_depth import checkpoint
from dino_depth.config import PretrainConfig
from dino_depth.errors import ConfigError, DataError, Interrupted
from dino_depth.pretrain.run_folder import RunFolder
from dino_depth.probing.figures import FIGURES
from dino_depth.probing.probe import ProbeConfig, choose_maps, count_seen, label_maps
from dino_depth.progress import Progress
from dino_depth.shards import DepthShards
from dino_depth.storage import ShardCache

__all__ = ["Best", "Evaluations", "check_evaluation", "choose_checkpoint", "find_best", "read_evaluations"]

GALLERY, QUERIES = 1024, 512  # maps a probe uses, chosen with seed 0 whatever the run's, so that runs compare
BATCH = 16  # keeps the process small, at high resolution too
KILLS = 2  # probes of one step that may be killed from outside before that counts as its result
LINE = 4  # teachers waiting before the log says that probes take longer than their interval


@dataclass(frozen=True)
class Best:
    """The best measured step.

    Attributes:
        step: optimisation steps behind it.
        metric: the figure of the probe that decided.
        value: its value, between ``low`` and ``high`` with 95 % confidence over query maps.
        evaluated: steps that were measured.
    """

    step: int
    metric: str
    value: float
    low: float
    high: float
    evaluated: int


def _weights(run: Path, step: int) -> Path:
    return run / "evaluations" / f"step-{step:08d}.pt"


def _result(run: Path, step: int) -> Path:
    return _weights(run, step).with_suffix(".json")


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def read_evaluations(run: Path) -> dict[int, dict]:
    """Step -> result of its probe, or ``{"error": reason}``, by step; empty if the run was not evaluated.

    Raises:
        DataError: a result is no such file.
    """
    found = {}
    for path in sorted((Path(run) / "evaluations").glob("step-*.json")):
        found[_step(path)] = _read(path)
    return found


def _read(path: Path) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name in FIGURES if "error" not in result else ():
            result["figures"][name]["trained"]["value"] + 0  # noqa: B018 - is it there?
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the result of a probe: {type(error).__name__}: {error}") from None
    return result


def find_best(results: dict[int, dict], metric: str) -> Best | None:
    """The step whose figure ``metric`` is largest, the earliest of equal ones; None if no probe succeeded."""
    good = {step: result["figures"][metric]["trained"] for step, result in results.items() if "error" not in result}
    if not good:
        return None
    step = max(good, key=lambda step: (good[step]["value"], -step))
    return Best(step, metric, **good[step], evaluated=len(good))


def _probe_settings(config: PretrainConfig) -> ProbeConfig:
    """Neighbours and regressions from the maps training sees, questions about maps it does not see."""
    train = config.train
    own = {} if train.evaluate_shards else {"gallery_splits": config.data.splits}
    return ProbeConfig(
        encoder="", shards=train.evaluate_shards or config.data.shards, query_splits=train.evaluate_splits,
        max_gallery=GALLERY, max_queries=QUERIES, batch=BATCH, baselines=False, device="cpu", **own,
    )  # fmt: skip


def check_evaluation(config: PretrainConfig):
    """Refuses what would make every probe fail, or ask about maps that were trained on.

    Raises:
        ConfigError: no map is held out, or a split does not exist.
        DataError: too few maps or categories.
    """
    train = config.train
    if train.evaluate_every < 0:
        raise ConfigError(f"train.evaluate_every must not be negative, got {train.evaluate_every}")
    if not train.evaluate_every:
        return
    if not (config.data.splits or train.evaluate_shards):
        raise ConfigError(
            "train.evaluate_every: data.splits is empty, so training sees every map; name the splits to train on, or "
            "other shards in train.evaluate_shards"
        )
    settings = _probe_settings(config)
    shards = DepthShards(settings.shards, [], ShardCache(config.data.cache, config.data.cache_gib))
    gallery, queries = choose_maps(shards, settings)
    label_maps(shards, gallery, queries)
    if seen := count_seen(config.data, shards, queries):
        raise ConfigError(
            f"train.evaluate_every: {seen} of the {len(queries)} maps to be scored are trained on; name other "
            "train.evaluate_splits or train.evaluate_shards"
        )


class Evaluations:
    """The probes of a run; does nothing where ``train.evaluate_every`` is 0 and on ranks that write nothing.

    Args:
        config: of the run, accepted by :func:`check_evaluation`.
        run: its folder. Probes that a run killed earlier left undone are first in line.

    Raises:
        DataError: a result in the folder is unreadable.
    """

    def __init__(self, config: PretrainConfig, run: RunFolder):
        self.every, self.steps = config.train.evaluate_every, config.train.steps
        self.metric, self.run = config.train.best_by, run
        self.active = self.every > 0 and run.writes
        self.line: list[int] = []  # steps to be measured, the first perhaps at this moment
        self.child, self.scratch, self.started = None, None, 0.0
        self.kills, self.late = 0, False
        if not self.active:
            return
        self.results = read_evaluations(run.path)
        for path in (run.path / "evaluations").glob("*.tmp"):
            path.unlink()
        self._keep_best()
        self.line = [_step(path) for path in sorted((run.path / "evaluations").glob("step-*.pt"))]
        settings = _probe_settings(config)
        shards = settings.shards if isinstance(settings.shards, str) else json.dumps(settings.shards)
        self.words = [
            "--shards", shards, "--gallery_splits", json.dumps(settings.gallery_splits),
            "--query_splits", json.dumps(settings.query_splits), "--max_gallery", str(GALLERY),
            "--max_queries", str(QUERIES), "--batch", str(BATCH), "--baselines", "false", "--device", "cpu",
        ]  # fmt: skip
        package = str(Path(dino_depth.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        self.environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if config.data.cache:
            self.environment["DINO_DEPTH_CACHE"] = config.data.cache

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Ends a probe that is running; the next run starts it again."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.scratch.cleanup()

    def update(self, step: int, teacher: nn.Module):
        """To be called after every step, and before the first: puts a teacher in line, collects what is done.

        Args:
            step: steps done.
            teacher: what :func:`dino_depth.checkpoint.load_backbone` reads, on any device.
        """
        if not self.active:
            return
        if (step % self.every == 0 or step == self.steps) and step not in self.results and step not in self.line:
            checkpoint.save({"step": step, "teacher": teacher.state_dict()}, _weights(self.run.path, step))
            self.line.append(step)
            if len(self.line) > LINE and not self.late:
                self.late = True
                self.run.log.warning("%d teachers wait to be evaluated: raise train.evaluate_every", len(self.line))
        self._poll()

    def finish(self, stop):
        """Waits for the probes that are left, after the last step.

        Args:
            stop: its ``asked`` tells whether to stop.

        Raises:
            Interrupted: it does.
        """
        if not self.line:
            return
        with Progress("evaluate", len(self.line), "steps") as progress:
            while self.line:
                left = len(self.line)
                self._poll()
                progress.advance(left - len(self.line))
                if stop.asked:
                    raise Interrupted(
                        f"{self.run.path}: trained, but {len(self.line)} evaluations are left; continue with --resume"
                    )
                time.sleep(0.05)

    def _poll(self):
        if self.child is not None and self.child.poll() is not None:
            self._collect(self.line[0], self.child.returncode)
        if self.child is None and self.line:
            self._start(self.line[0])

    def _start(self, step: int):
        # Not in the run folder: the probe of a run that was killed may still be at work on the same step.
        self.scratch, self.started = tempfile.TemporaryDirectory(prefix="dino-depth-"), time.monotonic()
        scratch = Path(self.scratch.name)
        command = ["nice", "-n", "19", sys.executable, "-m", "dino_depth.cli", "probe"]
        command += [str(_weights(self.run.path, step)), *self.words, "--out", str(scratch / "result.json")]
        with open(scratch / "errors", "wb") as errors:
            # In a session of its own: Ctrl-C is for the run, which ends its probe itself.
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def _collect(self, step: int, code: int):
        """Takes the result of the probe that just ended."""
        log, seconds = self.run.log, time.monotonic() - self.started
        scratch, self.child = Path(self.scratch.name), None
        lines = (scratch / "errors").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code < 0 and self.kills + 1 < KILLS:
            self.kills += 1
            self.scratch.cleanup()
            log.warning("evaluation of step %d was killed by signal %d and starts again", step, -code)
            return
        self.kills = 0
        if not code:
            try:
                result = _read(scratch / "result.json")
            except DataError as error:
                code, lines = 1, [str(error)]
        if code:
            reason = f"killed by signal {-code}" if code < 0 else (lines or [f"exit code {code}"])[-1]
            result = {"error": reason.removeprefix("dino-depth: ")}
            log.warning("evaluation of step %d failed, the run goes on: %s", step, result["error"])
        else:
            values = {name: result["figures"][name]["trained"]["value"] for name in FIGURES}
            self.run.write_events(step, {f"evaluation/{name}": value for name, value in values.items()})
        self.scratch.cleanup()
        _write(_result(self.run.path, step), result)
        self.results[step] = result
        self.line.remove(step)
        best = self._keep_best()
        if not code:
            text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            log.info("evaluation of step %d (%.0f s): %s; best by %s: step %d", step, seconds, text, self.metric, best)

    def _keep_best(self) -> int | None:
        """Keeps the teacher of the best step and no other measured one; a kill at any moment is made good here."""
        path, best = self.run.path, find_best(self.results, self.metric)
        for step in self.results:
            if best and step == best.step and _weights(path, step).is_file():
                kept = path / "checkpoints" / "best.pt"
                kept.parent.mkdir(exist_ok=True)
                os.replace(_weights(path, step), kept)
            _weights(path, step).unlink(missing_ok=True)
        if best:
            _write(path / "best.json", vars(best))
        return best.step if best else None


def _write(path: Path, value: dict):
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def choose_checkpoint(run: Path, name: str) -> tuple[Path, dict]:
    """The checkpoint file of a run that ``name`` means, and why it is that one.

    Args:
        name: ``last``, the newest that can be read, ``best`` (by the probes during training), a step that is still
            there, or a file.

    Returns:
        the file, and ``criterion`` (``last``, ``best``, ``step`` or ``file``); for ``best`` with the fields of
        :class:`Best`.

    Raises:
        ConfigError: there is no such checkpoint.
        DataError: none can be read, or the notes about the best one cannot.
    """
    run, kept = Path(run), checkpoint.checkpoints(run)
    if name == "last":
        if (found := checkpoint.newest(run)) is None:
            raise ConfigError(f"{run}: no checkpoint yet")
        return found[0], {"criterion": "last"}
    if name == "best":
        path = run / "checkpoints" / "best.pt"
        try:
            best = Best(**json.loads((run / "best.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            best = None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{run / 'best.json'}: unreadable: {error}") from None
        if best is None or not path.is_file():
            raise ConfigError(f"--checkpoint best: {run} has none; it is kept where train.evaluate_every is set")
        return path, {"criterion": "best", **vars(best)}
    if name.isdecimal():
        path = checkpoint.checkpoint_path(run, int(name))
        if not path.is_file():
            steps = ", ".join(str(_step(path)) for path in kept) or "none"
            raise ConfigError(f"--checkpoint {name}: {run} keeps no checkpoint of that step; it keeps {steps}")
        return path, {"criterion": "step"}
    if not Path(name).is_file():
        raise ConfigError(f"--checkpoint {name}: no such file; or last, best or a step")
    return Path(name), {"criterion": "file"}
