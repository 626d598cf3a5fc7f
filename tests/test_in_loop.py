"""Probes beside the loop: the same steps whatever the timing, kills, failures; the best is kept, nothing is stalled."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_pretrain import ROOT, assert_same, command, copy

from dino_depth import checkpoint
from dino_depth.config import TrainConfig
from dino_depth.errors import ConfigError, DataError, Interrupted
from dino_depth.pretrain import in_loop
from dino_depth.pretrain.in_loop import Best, Evaluations, choose_checkpoint, find_best, read_evaluations
from dino_depth.pretrain.train import pretrain
from dino_depth.probing.figures import FIGURES
from dino_depth.probing.probe import ProbeConfig, probe
from dino_depth.publish.export import ExportConfig, export

EVERY = 3  # of the 8 steps of the tiny run: steps 0, 3, 6 and 8 are measured
MEASURED = [0, 3, 6, 8]
PYTHON, ENVIRONMENT = sys.executable, os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def evaluated(tiny, tmp_path):
    return copy(tiny, tmp_path / "run", train={"evaluate_every": EVERY, "keep": 1, "best_by": "curvature"})


def figures(**values: float) -> dict:
    """The part of a probe's result that decides."""
    named = dict.fromkeys(FIGURES, 0.5) | values
    return {"figures": {name: {"trained": {"value": v, "low": v - 1, "high": v + 1}} for name, v in named.items()}}


# What the stand-in for Python does, in the words of a shell: $weights, $out and $step are set.
STAND_IN = r"""#!/bin/sh
weights=$4
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
step=$(basename "$weights" .pt | sed 's/step-0*\(.\)/\1/')
[ -f "$weights" ] || exit 9
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces the probe's process by a shell script, which starts at once."""

    def install(script: str):
        path = tmp_path / "stand_in.sh"
        path.write_text(STAND_IN + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(in_loop.sys, "executable", str(path))

    return install


def answer(curve: dict[int, float], folder: Path) -> str:
    """The part of a script that answers step s with curvature curve[s]."""
    folder.mkdir(exist_ok=True)
    for step, value in curve.items():
        (folder / f"{step}.json").write_text(json.dumps(figures(curvature=value)))
    return f"cp {folder}/$step.json $out\n"


def test_a_probe_during_training_equals_one_afterwards_and_nan_fails_by_name(evaluated):
    """Real processes on the first and the last teacher, whose weights are made not finite."""
    saved, save = {}, checkpoint.save

    def keep(state, path):
        if path.parent.name == "evaluations" and state["step"] == 8:
            state["teacher"]["backbone.norm.weight"] = torch.full((32,), torch.nan)
        save(state, path)
        saved[path.parent.name, state["step"]] = path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_loop.checkpoint, "save", keep)
        pretrain(copy(evaluated, evaluated.out, train={"evaluate_every": 100}))
    run = Path(evaluated.out)
    results = read_evaluations(run)
    assert list(results) == [0, 8] and list(results[8]) == ["error"]
    assert "run, step 8: features of" in results[8]["error"] and "NaN" in results[8]["error"]
    again = run / "evaluations" / "again.pt"
    again.write_bytes(saved["evaluations", 0])
    settings = {"gallery_splits": ["train"], "max_gallery": 1024, "max_queries": 512, "batch": 16, "device": "cpu"}
    full = probe(ProbeConfig(str(again), evaluated.data.shards, **settings))
    assert full["encoder"] == "run, step 0" and full["queries_seen_in_training"] == 0
    for name in FIGURES:
        assert results[0]["figures"][name] == {"trained": full["figures"][name]["trained"]}
        # The run began at random, so its first teacher is the twin of the probe.
        assert full["figures"][name]["gain"] == {"value": 0, "low": 0, "high": 0}
    value = full["figures"]["curvature"]["trained"]["value"]
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["metric"], best["value"], best["evaluated"]) == (0, "curvature", value, 1)
    assert (run / "checkpoints" / "best.pt").read_bytes() == saved["evaluations", 0]
    log = (run / "run.log").read_text()
    assert "evaluation of step 0 (" in log and f"curvature {value:.3f}; best by curvature: step 0" in log
    assert "evaluation of step 8 failed, the run goes on: run, step 8" in log


def test_the_curve_is_in_tensorboard_and_not_in_the_metrics(evaluated, tmp_path, stand_in):
    curve = {0: 0.1, 3: 0.4, 6: 0.3, 8: 0.2}
    stand_in(answer(curve, tmp_path / "answers"))
    pretrain(evaluated)
    run = Path(evaluated.out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and not any("evaluation" in key for key in rows[-1])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert {point.step: point.value for point in events.Scalars("evaluation/curvature")} == pytest.approx(curve)
    assert len(events.Scalars("loss")) == 8


def test_training_is_the_same_with_and_without_probes(evaluated, tiny, tmp_path, stand_in):
    stand_in(answer(dict.fromkeys(MEASURED, 0.5), tmp_path / "answers"))
    pretrain(evaluated)
    pretrain(copy(tiny, tmp_path / "plain"))
    first, second = (
        checkpoint.load(checkpoint.checkpoints(Path(path))[-1]) for path in (evaluated.out, tmp_path / "plain")
    )
    assert_same(first, second)
    assert not (tmp_path / "plain" / "evaluations").exists() and not (tmp_path / "plain" / "best.json").exists()


def test_the_loop_does_not_wait_and_the_run_does(evaluated, tmp_path, stand_in):
    """No probe ends before the last step is done; all the same, all of them are measured, one at a time, in order."""
    log = tmp_path / "order"
    wait = f"while [ ! -f {evaluated.out}/checkpoints/step-00000008.pt ]; do sleep 0.01; done\n"
    running = f"[ -f {log}.busy ] && exit 8\ntouch {log}.busy\necho $step >> {log}\nsleep 0.05\nrm {log}.busy\n"
    stand_in(wait + running + answer({0: 0.1, 3: 0.3, 6: 0.3, 8: 0.2}, tmp_path / "answers"))
    pretrain(evaluated)
    assert log.read_text().split() == [str(step) for step in MEASURED]
    run = Path(evaluated.out)
    assert list(read_evaluations(run)) == MEASURED
    assert json.loads((run / "best.json").read_text())["step"] == 3  # of equal values the earlier step
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.pt", "step-00000008.pt"]
    assert checkpoint.load(run / "checkpoints" / "best.pt")["step"] == 3


def test_a_long_line_is_said_once(evaluated, tmp_path, stand_in):
    stand_in(
        f"while [ ! -f {evaluated.out}/checkpoints/step-00000008.pt ]; do sleep 0.01; done\n"
        + answer(dict.fromkeys(range(9), 0.5), tmp_path / "answers")
    )
    pretrain(copy(evaluated, evaluated.out, train={"evaluate_every": 1}))
    log = Path(evaluated.out, "run.log").read_text()
    assert log.count("5 teachers wait to be evaluated: raise train.evaluate_every") == log.count("teachers wait") == 1


def test_a_probe_that_fails_is_recorded_and_the_run_goes_on(evaluated, tmp_path, stand_in):
    fails = "[ $step = 3 ] && { echo Traceback >&2; echo 'dino-depth: features of 2 maps are NaN' >&2; exit 3; }\n"
    silent = "[ $step = 6 ] && { echo '{}' > $out; exit 0; }\n"
    stand_in(fails + silent + answer({0: 0.1, 3: 9.0, 6: 9.0, 8: 0.2}, tmp_path / "answers"))
    pretrain(evaluated)
    run = Path(evaluated.out)
    results = read_evaluations(run)
    assert list(results) == MEASURED
    assert results[3] == {"error": "features of 2 maps are NaN"} and "not the result of a probe" in results[6]["error"]
    log = (run / "run.log").read_text()
    assert "evaluation of step 3 failed, the run goes on: features of 2 maps are NaN" in log
    assert json.loads((run / "best.json").read_text()) | {"low": 0, "high": 0} == vars(
        Best(8, "curvature", 0.2, 0, 0, evaluated=2)
    )
    assert not list((run / "evaluations").glob("*.pt"))


def test_where_every_probe_fails_there_is_no_best(evaluated, tmp_path, stand_in):
    stand_in("exit 1\n")
    pretrain(evaluated)
    assert set(map(str, read_evaluations(Path(evaluated.out)).values())) == {"{'error': 'exit code 1'}"}
    assert not Path(evaluated.out, "best.json").exists()
    with pytest.raises(ConfigError, match=r"--checkpoint best: .* has none"):
        choose_checkpoint(evaluated.out, "best")


@pytest.mark.parametrize("times, kept", [(1, {0, 3, 6, 8}), (2, {0, 6, 8})])
def test_a_probe_killed_from_outside_is_tried_once_more(evaluated, tmp_path, stand_in, times, kept):
    kill = f"[ $step = 3 ] && [ $(cat {tmp_path}/kills 2>/dev/null | wc -c) -lt {times} ] && "
    kill += f"{{ printf x >> {tmp_path}/kills; kill -9 $$; }}\n"
    stand_in(kill + answer(dict.fromkeys(MEASURED, 0.5), tmp_path / "answers"))
    pretrain(evaluated)
    results = read_evaluations(Path(evaluated.out))
    assert list(results) == MEASURED and {step for step in results if "error" not in results[step]} == kept
    assert "evaluation of step 3 was killed by signal 9 and starts again" in Path(evaluated.out, "run.log").read_text()
    if times == 2:
        assert results[3]["error"] == "killed by signal 9"


def test_killed_at_any_moment_the_same_teachers_are_measured(evaluated, tmp_path, stand_in):
    """SIGKILL with a teacher in line, during a probe and after one, beside a run that was never stopped."""
    digest = 'sed "s/SHA/$(sha256sum < $weights | cut -c1-64)/" '
    script = (
        answer({0: 0.1, 3: 0.3, 6: 0.9, 8: 0.2}, tmp_path / "answers")
        .replace("cp ", digest)
        .replace(" $out", " > $out")
    )
    for path in (tmp_path / "answers").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": "SHA"}))
    stand_in("sleep 0.3\n" + script)
    pretrain(copy(evaluated, tmp_path / "whole"))
    config, run = copy(evaluated, tmp_path / "killed", train={"checkpoint_every": 4}), tmp_path / "killed"
    words = command(config, tmp_path, "--resume")
    program = "import sys; from dino_depth import cli; from dino_depth.pretrain import in_loop; "
    program += f"sys.executable = {in_loop.sys.executable!r}; sys.exit(cli.main(sys.argv[1:]))"
    words = [PYTHON, "-c", program, *words[3:]]
    moments = [
        lambda: any((run / "evaluations").glob("step-*.pt")),
        lambda: (run / "evaluations" / "step-00000000.json").is_file(),
        lambda: (run / "checkpoints" / "step-00000008.pt").is_file(),
    ]
    for moment in moments:
        process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not moment():
            time.sleep(0.002)
        process.kill()
        process.wait()
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = read_evaluations(tmp_path / "whole"), read_evaluations(run)
    assert first == second and list(first) == MEASURED and len({first[step]["teacher"] for step in first}) == 4
    assert json.loads((tmp_path / "whole" / "best.json").read_text()) == json.loads((run / "best.json").read_text())
    assert_same(*(checkpoint.load(path / "checkpoints" / "best.pt") for path in (tmp_path / "whole", run)))
    assert not list((run / "evaluations").glob("*.pt")) and not list((run / "evaluations").glob("*.tmp"))


def test_a_signal_while_waiting_leaves_the_rest_for_resume(evaluated, tmp_path, stand_in):
    hang = f"[ $step = 6 ] && [ ! -f {tmp_path}/go ] && sleep 60\n"
    stand_in(hang + answer({0: 0.1, 3: 0.3, 6: 0.9, 8: 0.2}, tmp_path / "answers"))
    run = Path(evaluated.out)

    class Stop:
        @property
        def asked(self):
            return (run / "evaluations" / "step-00000003.json").is_file()

    finish = Evaluations.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluations, "finish", lambda self, stop: finish(self, Stop()))
        started = time.monotonic()
        with pytest.raises(Interrupted, match="2 evaluations are left; continue with --resume"):
            pretrain(evaluated)
    assert time.monotonic() - started < 30  # the hanging process was ended, not waited for
    assert list(read_evaluations(run)) == [0, 3]
    (tmp_path / "go").touch()
    pretrain(dataclasses.replace(evaluated, resume=True))
    assert list(read_evaluations(run)) == MEASURED
    assert choose_checkpoint(run, "best")[1]["step"] == 6
    assert checkpoint.load(run / "checkpoints" / "best.pt")["step"] == 6


@pytest.mark.parametrize("crash", ["_keep_best", "_write"])
def test_a_crash_between_two_files_is_made_good(evaluated, tmp_path, stand_in, monkeypatch, crash):
    """The result is there, the best teacher or its description not yet."""
    stand_in(answer({0: 0.1, 3: 0.9, 6: 0.3, 8: 0.2}, tmp_path / "answers"))

    def fail(*arguments):
        if crash == "_keep_best" and 3 in arguments[0].results:
            raise KeyboardInterrupt
        if crash == "_write" and arguments[0].name == "best.json" and arguments[1]["step"] == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    owner = Evaluations if crash == "_keep_best" else in_loop
    original = getattr(owner, crash)
    with monkeypatch.context() as patch:
        patch.setattr(owner, crash, fail)
        with pytest.raises(KeyboardInterrupt):
            pretrain(evaluated)
    assert (Path(evaluated.out) / "evaluations" / "step-00000003.json").is_file()
    pretrain(dataclasses.replace(evaluated, resume=True))
    path, choice = choose_checkpoint(evaluated.out, "best")
    assert choice["step"] == checkpoint.load(path)["step"] == 3
    assert list(read_evaluations(Path(evaluated.out))) == MEASURED


def test_the_probe_runs_on_one_thread_at_low_priority_without_gpu(evaluated, tmp_path, stand_in):
    told = tmp_path / "told"
    stand_in(
        f'echo "$(nice) $OMP_NUM_THREADS [$CUDA_VISIBLE_DEVICES] $1 $2 $3" > {told}\n'
        + answer({0: 0.1, 8: 0.2}, tmp_path / "answers")
    )
    pretrain(copy(evaluated, evaluated.out, train={"evaluate_every": 50}))
    assert told.read_text().split()[1:3] == ["1", "[]"]
    assert told.read_text().split()[0] == "19"


def test_a_step_in_a_line_is_not_saved_twice(evaluated, tmp_path, stand_in):
    """A resumed run passes steps again that are measured or in line already."""
    stand_in(answer(dict.fromkeys(MEASURED, 0.5), tmp_path / "answers"))
    pretrain(copy(evaluated, evaluated.out, train={"checkpoint_every": 100}))
    run = Path(evaluated.out)
    before = {path.name: path.stat().st_mtime_ns for path in (run / "evaluations").iterdir()}
    (run / "checkpoints" / "step-00000008.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_loop.checkpoint, "save", _only_checkpoints(checkpoint.save))
        pretrain(dataclasses.replace(evaluated, resume=True))
    assert {path.name: path.stat().st_mtime_ns for path in (run / "evaluations").iterdir()} == before


def _only_checkpoints(save):
    def checked(state, path):
        assert path.parent.name == "checkpoints"
        save(state, path)

    return checked


def test_the_best_is_the_largest_and_the_earliest():
    results = {0: figures(curvature=0.1, knn_class=0.9), 10: figures(curvature=0.4), 20: {"error": "x"}}
    results |= {30: figures(curvature=0.4, knn_patch=0.6), 40: figures(curvature=0.2)}
    assert find_best(results, "curvature") == Best(10, "curvature", 0.4, -0.6, 1.4, evaluated=4)
    assert find_best(results, "knn_class").step == 0 and find_best(results, "knn_patch").step == 30
    assert find_best({5: {"error": "x"}}, "curvature") is None and find_best({}, "curvature") is None
    choices = TrainConfig.__dataclass_fields__["best_by"].type.__args__
    assert set(choices) == FIGURES.keys() - {"normal_angle"}  # where less is better


@pytest.mark.parametrize(
    "train, data, kind, text",
    [
        ({"evaluate_every": -1}, {}, ConfigError, "must not be negative"),
        ({}, {"splits": []}, ConfigError, "training sees every map"),
        ({}, {"splits": ["train", "test"]}, DataError, "0 query maps"),
        ({"evaluate_splits": ["train"]}, {}, ConfigError, "'train' is in both"),
        ({"evaluate_splits": ["trian"]}, {}, ConfigError, "no split 'trian'"),
        ({"evaluate_shards": "SHARDS", "evaluate_splits": ["test"]}, {"splits": []}, ConfigError, "24 of the 24 maps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(evaluated, train, data, kind, text):
    if train.get("evaluate_shards"):
        train = train | {"evaluate_shards": evaluated.data.shards}
    with pytest.raises(kind, match=text) as error:
        pretrain(copy(evaluated, evaluated.out, train=train, data=data))
    assert "\n" not in str(error.value) and not Path(evaluated.out).exists()


def test_a_run_of_a_single_split_has_nothing_to_be_asked(evaluated, tmp_path):
    from test_probe import write_shards

    folder = write_shards(tmp_path / "single", splits=("train",), maps=12)
    with pytest.raises(ConfigError, match="maps to be scored are trained on"):
        pretrain(copy(evaluated, evaluated.out, data={"shards": folder, "splits": ["train"]}))


def test_other_shards_can_be_asked_about(evaluated, tmp_path, stand_in):
    from test_probe import write_shards

    folder = write_shards(tmp_path / "held_out")
    told = tmp_path / "told"
    stand_in(f"cat /proc/$$/cmdline | tr '\\0' ' ' > {told}\n" + answer({0: 0.1, 8: 0.2}, tmp_path / "answers"))
    config = copy(
        evaluated, evaluated.out, train={"evaluate_every": 50, "evaluate_shards": folder}, data={"splits": []}
    )
    pretrain(config)
    assert f"--shards {folder} --gallery_splits" in told.read_text() and list(
        read_evaluations(Path(evaluated.out))
    ) == [0, 8]


def test_a_checkpoint_is_chosen_by_name(evaluated, tmp_path, stand_in):
    stand_in(answer({0: 0.1, 3: 0.3, 6: 0.9, 8: 0.2}, tmp_path / "answers"))
    pretrain(copy(evaluated, evaluated.out, train={"keep": 2}))
    run = Path(evaluated.out)
    assert choose_checkpoint(run, "last") == (checkpoint.checkpoint_path(run, 8), {"criterion": "last"})
    path, choice = choose_checkpoint(run, "best")
    assert path == run / "checkpoints" / "best.pt"
    assert choice == {
        "criterion": "best", "step": 6, "metric": "curvature", "value": 0.9, "low": pytest.approx(-0.1),
        "high": 1.9, "evaluated": 4,
    }  # fmt: skip
    assert choose_checkpoint(run, "6") == (checkpoint.checkpoint_path(run, 6), {"criterion": "step"})
    assert choose_checkpoint(run, str(path)) == (path, {"criterion": "file"})
    with pytest.raises(ConfigError, match=r"--checkpoint 3: .* keeps no checkpoint of that step; it keeps 6, 8"):
        choose_checkpoint(run, "3")
    with pytest.raises(ConfigError, match=r"--checkpoint bets: no such file; or last, best or a step"):
        choose_checkpoint(run, "bets")
    (run / "best.json").write_text("{")
    with pytest.raises(DataError, match=r"best\.json: unreadable"):
        choose_checkpoint(run, "best")
    (run / "evaluations" / "step-00000003.json").write_text('{"figures": {}}')
    with pytest.raises(DataError, match=r"step-00000003\.json: not the result of a probe"):
        read_evaluations(run)


def test_an_export_records_which_checkpoint_and_why(evaluated, tmp_path, stand_in):
    stand_in(answer({0: 0.1, 3: 0.3, 6: 0.9, 8: 0.2}, tmp_path / "answers"))
    pretrain(evaluated)
    cards, origins = {}, {}
    for name in ("best", "last"):
        out = tmp_path / name
        export(ExportConfig(evaluated.out, str(out), checkpoint=name, image_size=42, samples=2))
        cards[name] = " ".join((out / "transformers" / "README.md").read_text().split())
        origins[name] = json.loads((out / "timm" / "provenance.json").read_text())
    assert (origins["best"]["step"], origins["last"]["step"]) == (6, 8)
    assert origins["best"]["checkpoint"] == "best.pt"
    assert origins["best"]["checkpoint_choice"] == choose_checkpoint(evaluated.out, "best")[1]
    assert origins["last"]["checkpoint_choice"] == {"criterion": "last"}
    expected = "after 6 steps of 8: of 4 steps probed on held-out maps the best by curvature (0.900, 95 % from -0.100"
    assert expected in cards["best"] and "after 8 steps." in cards["last"]
