"""Raw synthetic data to an exported encoder and a report, through the same functions as the single commands."""

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from data_prep.check import CheckConfig, check
from data_prep.folder import FolderOptions
from data_prep.shards import PrepareConfig, prepare
from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.evaluate import EvaluateConfig, evaluate
from dino_depth.anomaly.report import ReportConfig, report
from dino_depth.config import PretrainConfig, parse
from dino_depth.errors import ConfigError, GateError
from dino_depth.inspection.convert import ConvertConfig, convert
from dino_depth.inspection.fit import FitConfig, fit
from dino_depth.inspection.predict import PredictConfig, predict
from dino_depth.inspection.rig import RIG
from dino_depth.pretrain.train import pretrain
from dino_depth.probing.probe import ProbeConfig, demo_gate, probe
from dino_depth.publish.export import ExportConfig, export
from dino_depth.publish.report import write_report

__all__ = ["DemoConfig", "demo"]

MARKER = ".dino-depth-demo"


@dataclass
class DemoConfig:
    """Synthetic raw data to an exported encoder and a report.

    Both trees are rendered, prepared and checked; the encoder is trained and probed on the first. (Parts in Eyecandies'
    layout stand five times closer to the camera; a run this short learns less from a mixture of scales.)

    Then an image encoder is pretrained the same way on the photographs of the same parts, and both serve ModMap on
    objects in SiM3D's layout, seen from a ring of views; the residual head, which needs no encoder, is scored beside it
    and has to be above random scores. At last a model is fitted on good parts of the first object, as users do with
    their own, and inspects a good and a bad one that it never saw.

    Attributes:
        out: folder of everything the demo makes; an earlier demo there is replaced.
        recipe: configuration of the pretraining, a file or the name of a shipped one.
        mvtec3d: training maps per category in MVTec 3D-AD's layout, which the encoder learns from.
        eyecandies: maps per category in Eyecandies' layout.
        test: test maps per category in MVTec 3D-AD's layout, which the probe asks about.
        size: side of the rendered maps, pixels.
        steps: of the pretraining; 0 keeps the configuration's.
        image_size: side the exported encoder's positions are stored at, pixels.
        image_steps: pretraining steps of the image encoder.
        objects: categories of the objects in SiM3D's layout; none leaves out the benchmark and the image encoder.
        benchmark_size: side of their views, pixels.
        head_steps: optimisation steps of ModMap.
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
    image_steps: int = 250
    objects: list[str] = field(default_factory=lambda: ["star_knob"])
    benchmark_size: int = 224
    head_steps: int = 300
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
    import_module("data_prep.synthetic.engines")  # an extra: whether it is there is known before anything is deleted
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
    if config.objects:
        failures = failures + _benchmark(config, out, exported, seconds)
    print(f"\nencoder  {exported}/transformers and {exported}/timm\nreport   {run}/report.html")
    if config.objects:
        print(f"         {out}/residual/report.html, with ModMap beside; {out}/inspection/*/page.html")
    if failures:
        raise GateError("demo: " + "; ".join(failures))


def _benchmark(config: DemoConfig, out: Path, exported: Path, seconds: dict[str, float]) -> list[str]:
    """An image encoder, a benchmark, ModMap on both encoders' features, the residual, pages; what fails the gate."""
    raw, photographs, images = out / "raw", str(out / "shards" / "photographs"), out / "image"
    with _stage("pretrain an encoder of images", seconds):
        source = FolderOptions(
            encoding="grey", glob="**/train/good/rgb/*.png", name="photographs", licence="Apache-2.0"
        )
        prepare(PrepareConfig("folder", str(raw / "mvtec3d"), photographs, samples_per_shard=256, folder=source))
        words = ["--config", config.recipe, "--data.shards", photographs, "--out", str(images / "run")]
        words += ["--data.normalization.method", "max", "--train.steps", str(config.image_steps)]
        pretrain(parse(PretrainConfig, words, "dino-depth pretrain"))
        export(ExportConfig(str(images / "run"), str(images / "export"), image_size=config.benchmark_size))
        export(ExportConfig(str(out / "run"), str(out / "benchmark-export"), image_size=config.benchmark_size))
    with _stage("render objects in SiM3D's layout", seconds):
        synth(
            SynthConfig(
                "sim3d", str(raw / "sim3d"), categories=config.objects, size=config.benchmark_size,
                seed=config.seed,
            )
        )  # fmt: skip
    with _stage("evaluate ModMap", seconds):
        words = ["--config", "sim3d_modmap", "--data.root", str(raw / "sim3d"), "--out", str(out / "evaluation")]
        words += ["--encoder.image", str(images / "export"), "--encoder.depth", str(out / "benchmark-export")]
        words += ["--encoder.size", str(config.benchmark_size), "--head.modmap.steps", str(config.head_steps)]
        words += ["--head.modmap.tokens", "64", "--device", "cpu"]
        evaluate(parse(EvaluateConfig, words, "dino-depth evaluate"))
    with _stage("evaluate the residual", seconds):
        words = ["--config", "sim3d_residual", "--data.root", str(raw / "sim3d"), "--out", str(out / "residual")]
        evaluate(parse(EvaluateConfig, [*words, "--device", "cpu"], "dino-depth evaluate"))
        # ModMap on encoders of minutes is near random scores: a page that shows it beside what works says so.
        report(ReportConfig(str(out / "residual"), compare=[str(out / "evaluation")]))
    with _stage("fit on good parts and inspect a scan", seconds):
        _inspect(out, raw / "sim3d", config.objects[0])
    return _above_random(out / "residual")


def _inspect(out: Path, root: Path, category: str):
    """What users do with parts of their own: all good parts but one to a model, and two scans that it never saw."""
    parts = out / "parts"
    convert(ConvertConfig("sim3d", str(root), str(parts), category=category))
    scans = parts / "scans"
    for folder in (sorted((parts / "good").glob("*_good"))[-1], sorted((parts / "bad").glob("*_bad"))[0]):
        (scans / folder.name).parent.mkdir(exist_ok=True)
        shutil.move(folder, scans / folder.name)
    shutil.copy(parts / "good" / RIG, scans)
    fit(FitConfig(parts=str(parts / "good"), out=str(out / "model"), train=1, device="cpu"))
    predict(PredictConfig(str(out / "model"), str(scans), str(out / "inspection"), device="cpu"))


def _above_random(run: Path) -> list[str]:
    """Why an evaluation is not above random scores on occupied voxels with its lower bound; empty if it is."""
    results, metric = json.loads((run / "results.json").read_text(encoding="utf-8")), "V-AUPRO@1% occupied"
    value, low = (results["mean"][metric][key] for key in ("value", "low"))
    random = sum(trial["baselines"]["random scores"][metric] for trial in results["trials"]) / len(results["trials"])
    print(f"   {results['head']}: {metric} {value:.3f}, lower bound {low:.3f}, random scores {random:.3f}")
    if low > random:
        return []
    return [f"{metric} of the residual has the lower bound {low:.3f}, random scores {random:.3f}"]
