"""Imports point one way, files stay small, and the loop stays readable."""

import ast
import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A run: what reads, makes and measures it. Frozen encoders, which others take, know of none.
RUNS = ("dino_depth.pretrain", "dino_depth.probing", "dino_depth.publish", "dino_depth.checkpoint", "dino_depth.shards")
SOURCES = [path for folder in ("dino_depth", "data_prep", "slurm") for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Modules of this project that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("dino_depth", "data_prep")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    place = str(path.relative_to(ROOT))
    found = imported(path)
    if place.startswith("data_prep/"):
        allowed = ("depth", "config", "errors", "licences", "lock", "picture", "progress", "sample", "shard_format")
        allowed += ("shard_index", "storage", "terminal")
        allowed += ("device",) if place == "data_prep/pseudo_depth.py" else ()  # the only one that computes
        wrong = {n for n in found if n.startswith("dino_depth.") and n.split(".")[1] not in allowed}
    elif place in ("dino_depth/cli.py", "dino_depth/demo.py") or place.startswith("slurm/"):
        wrong = set()
    elif place.startswith("dino_depth/bench/"):
        # Judges frozen encoders only: it renders and reads by data_prep, and takes geometry and metrics from anomaly.
        upward = ("dino_depth.cli", "dino_depth.demo", *RUNS, "dino_depth.anomaly.heads")
        upward += ("dino_depth.anomaly.evaluate", "dino_depth.slurm")
        wrong = {n for n in found if n.startswith(upward)}
    elif place.startswith(("dino_depth/pretrain/", "dino_depth/probing/", "dino_depth/publish/")):
        upward = ("data_prep", "dino_depth.cli", "dino_depth.demo", "dino_depth.anomaly", "dino_depth.bench")
        # What a run left is published; nothing that trains or measures knows of it.
        upward += () if place.startswith("dino_depth/publish/") else ("dino_depth.publish",)
        # Training asks for a probe; what probes reads a run's checkpoints and maps, and knows of no loop.
        upward += ("dino_depth.pretrain",) if place.startswith("dino_depth/probing/") else ()
        wrong = {n for n in found if n.startswith(upward)}
    elif place.startswith("dino_depth/anomaly/"):
        # Benchmarks are raw datasets: their decoders are those of data preparation.
        reads_raw = place.startswith("dino_depth/anomaly/benchmarks/")
        upward = ("dino_depth.cli", "dino_depth.demo", *RUNS, "dino_depth.bench")
        upward += () if reads_raw else ("data_prep",)
        wrong = {n for n in found if n.startswith(upward)}
        if place.startswith("dino_depth/anomaly/heads/"):
            heads = [path.stem for path in (ROOT / "dino_depth/anomaly/heads").glob("[!_]*.py")]
            wrong |= {n for n in found if n.startswith(tuple(f"dino_depth.anomaly.heads.{name}" for name in heads))}
    elif place.startswith("dino_depth/inspection/"):
        # Own parts are raw data, inspected by the models of anomaly detection.
        upward = ("dino_depth.cli", "dino_depth.demo", *RUNS)
        upward += () if place == "dino_depth/inspection/cad.py" else ("data_prep.synthetic",)  # the only one to render
        wrong = {n for n in found if n.startswith(upward)}
    else:
        upward = ("data_prep", "dino_depth.cli", "dino_depth.demo", "dino_depth.anomaly", "dino_depth.pretrain")
        upward += ("dino_depth.slurm", "dino_depth.bench", "dino_depth.inspection", "dino_depth.publish")
        upward += ("dino_depth.probing",)
        wrong = {n for n in found if n.startswith(upward)}
    assert wrong == set()


def test_data_preparation_never_loads_torch():
    """Workers that read files start fast and small; pseudo-depth loads what it needs when it is asked for depth."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "data_prep"):
            inside = "" if path.name == "pseudo_depth.py" else r"\s*"
            assert not re.search(rf"^{inside}(import|from) (torch|timm|transformers)\b", path.read_text(), re.M), path


def test_the_loop_stays_readable():
    assert len((ROOT / "dino_depth/pretrain/train.py").read_text().splitlines()) < 330
    tree = ast.parse((ROOT / "dino_depth/pretrain/train.py").read_text())
    lengths = {node.name: node.end_lineno - node.lineno for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert max(lengths.values()) < 120, max(lengths, key=lengths.get)


def test_no_photometric_operation_exists():
    words = r"jitter|brightness|contrast|saturation|solarize|posterize|GaussianBlur|grayscale\("
    folders = [ROOT / "dino_depth" / name for name in ("pretrain", "probing")]
    paths = [path for folder in folders for path in folder.rglob("*.py")] + [ROOT / "dino_depth" / "shards.py"]
    for path in paths:
        assert not re.search(words, path.read_text(), re.I), path


def test_nothing_is_unpickled_or_executed():
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|yaml\.load\(|(?<![.\w])(?:eval|exec)\(|trust_remote_code=True", text), path
        for call in re.findall(r"(?:torch|np|numpy)\.load\([^)]*\)", text):
            assert "weights_only=True" in call or "allow_pickle=False" in call, (path, call)


def test_every_package_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    moved = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    for path in SOURCES:
        folder = path.relative_to(ROOT).parent
        name = next((new for new, old in moved.items() if str(folder) == old), ".".join(folder.parts))
        assert name in listed, f"{path}: setup.cfg does not name its package {name}"
