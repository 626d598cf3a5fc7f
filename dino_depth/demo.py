"""Raw synthetic data to an exported encoder and a report, through the same functions as the single commands."""

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.check import CheckConfig, check
from data_prep.shards import PrepareConfig, prepare
from data_prep.synthetic import SynthConfig, synth
from dino_depth.config import PretrainConfig, parse
from dino_depth.errors import ConfigError, GateError
from dino_depth.pretrain.export import ExportConfig, export
from dino_depth.pretrain.probe import ProbeConfig, demo_gate, probe
from dino_depth.pretrain.report import write_report
from dino_depth.pretrain.train import pretrain

__all__ = ["DemoConfig", "demo"]

MARKER = ".dino-depth-demo"


@dataclass
class DemoConfig:
    """Synthetic raw data to an exported encoder and a report.

    Both trees are rendered, prepared and checked; the encoder is trained and probed on the first. (Parts in Eyecandies'
    layout stand five times closer to the camera; a run this short learns less from a mixture of scales.)

    Attributes:
        out: folder of everything the demo makes; an earlier demo there is replaced.
        recipe: configuration of the pretraining, a file or the name of a shipped one.
        mvtec3d: training maps per category in MVTec 3D-AD's layout, which the encoder learns from.
        eyecandies: maps per category in Eyecandies' layout.
        test: test maps per category in MVTec 3D-AD's layout, which the probe asks about.
        size: side of the rendered maps, pixels.
        steps: of the pretraining; 0 keeps the configuration's.
        image_size: side the exported encoder's positions are stored at, pixels.
        seed: of data and training.
    """

    out: str = "demo"
    recipe: str = "pretrain_demo"
    mvtec3d: int = 160
    eyecandies: int = 8
    test: int = 80
    size: int = 144
    steps: int = 0
    image_size: int = 896
    seed: int = 0


@contextmanager
def _stage(title: str, seconds: dict[str, float]):
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - start, 1)
    print(f"   {seconds[title]:.0f} s", flush=True)


def demo(config: DemoConfig):
    """Runs the whole pipeline.

    Raises:
        ConfigError: ``out`` holds something that is not an earlier demo.
        GateError: the encoder is not measurably better than its random initialisation, or a stage's gate failed.
    """
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ConfigError(f"--out {out}: folder is not empty and holds no earlier demo")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    run, seconds, folders = out / "run", {}, []
    for layout, count, test in (
        ("mvtec3d", config.mvtec3d, config.test),
        ("eyecandies", config.eyecandies, 0),
    ):
        raw, shards = str(out / "raw" / layout), str(out / "shards" / layout)
        with _stage(f"render raw data as {layout}", seconds):
            synth(
                SynthConfig(layout, raw, per_category=count, test_per_category=test, size=config.size, seed=config.seed)
            )
        with _stage(f"prepare and check shards of {layout}", seconds):
            prepare(PrepareConfig(layout, raw, shards, samples_per_shard=256))
            check(CheckConfig(shards))
        folders.append(shards)
    with _stage("pretrain", seconds):
        words = ["--config", config.recipe, "--data.shards", folders[0], "--out", str(run)]
        words += ["--train.seed", str(config.seed)]
        words += ["--train.steps", str(config.steps)] if config.steps else []
        pretrain(parse(PretrainConfig, words, "dino-depth pretrain"))
    with _stage("probe", seconds):
        probed = probe(ProbeConfig(str(run), folders[0], out=str(run / "probe.json"), seed=config.seed))
    with _stage("export", seconds):
        exported = out / "export"
        export(ExportConfig(str(run), str(exported), image_size=config.image_size))
    failures = demo_gate(probed)
    results = {
        "probe": probed,
        "parity": json.loads((exported / "parity.json").read_text(encoding="utf-8")),
        "seconds": seconds,
        "gate": {"passed": not failures, "failures": failures},
    }
    with _stage("report", seconds):
        (run / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_report(run, results, folders[0], run / "report.html")
    print(f"\nencoder  {exported}/transformers and {exported}/timm\nreport   {run}/report.html")
    if failures:
        raise GateError("demo: " + "; ".join(failures))
