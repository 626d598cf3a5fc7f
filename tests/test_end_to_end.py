"""The commands as a user types them: on genuine files, from an installed wheel, and the whole demo in small."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import pytest
import yaml

from dino_depth.cli import main

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "realdata"
SHIPPED = ROOT / "tests" / "sensor"  # genuine files that lie here
SMALL = [
    *("--config", "pretrain_demo", "--data.splits", "[]", "--data.workers", "0", "--train.batch", "4"),
    *("--crops.global_size", "42", "--crops.local_size", "28", "--crops.local_crops", "2", "--train.steps", "3"),
]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "name, dataset, options",
    [
        ("", "folder", []),
        ("mvtec3d_cable_gland", "mvtec3d", []),
        ("open3d_rgbd_redwood5/RGBD", "folder", ["--folder.glob", "depth/*.png", "--folder.unit", "mm"]),
        ("tsdf_7scenes_16", "folder", ["--folder.unit", "mm", "--folder.missing", "[65535]"]),
        ("pcl_kinect_mosd", "folder", []),
    ],
)
def test_real_files_are_prepared_checked_and_trained_on(tmp_path, name, dataset, options):
    root = REAL / name if name else SHIPPED
    if not root.is_dir():
        pytest.skip(f"shared/realdata/{name} is not beside this checkout")
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert run("prep", dataset, "--root", root, "--out", shards, "--workers", 1, *options) == 0
    assert run("check", shards) == 0
    total = json.loads((shards / "manifest.json").read_text())["total"]
    batch = ["--train.batch", 2] if total < 4 else []
    assert run("pretrain", *SMALL, *batch, "--data.shards", shards, "--out", out) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 1
    assert list(out.glob("checkpoints/step-00000003.pt"))


def test_the_demo_in_small_makes_every_file_and_fails_its_gate_honestly(tmp_path, capsys):
    """Three steps cannot beat random initialisation by six points: the demo must say so and exit 4."""
    small = yaml.safe_load((ROOT / "configs" / "pretrain_demo.yaml").read_text())
    small["train"] |= {"batch": 8}
    small["crops"] |= {"global_size": 42, "local_size": 28, "local_crops": 2}
    small["data"] |= {"workers": 0}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    words = ["--recipe", tmp_path / "small.yaml", "--mvtec3d", 4, "--eyecandies", 2, "--test", 4, "--size", 48]
    out = tmp_path / "demo"
    words += ["--image_steps", 3, "--benchmark_size", 56, "--head_steps", 3, "--objects", "[hex_nut]"]
    assert run("demo", "--out", out, *words, "--steps", 3, "--image_size", 56) == 4
    assert "demo: " in capsys.readouterr().err.splitlines()[-1]
    results = json.loads((out / "run" / "results.json").read_text())
    assert results["parity"]["passed"] and not results["gate"]["passed"]
    page = (out / "run" / "report.html").read_text()
    assert "http" not in page.split("<body")[1].split("src=")[0] and "data:image/png;base64," in page
    for name in ("transformers/model.safetensors", "timm/model.safetensors", "transformers/README.md"):
        assert (out / "export" / name).is_file()
    measured = json.loads((out / "evaluation" / "results.json").read_text())
    assert measured["complete"] and measured["synthetic"] and measured["categories"] == ["hex_nut"]
    assert (out / "residual" / "report.html").stat().st_size > 100_000
    card = (out / "export/transformers/README.md").read_text()
    assert "rendered parts in the layout of mvtec3d" in card and "\ndatasets:" not in card
    assert run("demo", "--out", tmp_path) == 2  # a folder that is no earlier demo is left alone
    assert out.is_dir()


def test_an_installed_wheel_works_away_from_the_checkout(tmp_path):
    """``pip install`` of a built wheel into a new environment, which borrows nothing but the dependencies."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "demo", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    make = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    built = subprocess.run(make, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    put = [*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = subprocess.run(put, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [site] = tmp_path.glob("venv/lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    metadata = next(site.glob("dino_depth-*.dist-info/METADATA")).read_text()
    assert (
        "Requires-Dist: torch>=" in metadata and 'Requires-Dist: embreex>=2.17.7.post6; extra == "render"' in metadata
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def installed(*words, program=tmp_path / "venv" / "bin" / "dino-depth", **more) -> str:
        done = subprocess.run([program, *words], cwd=tmp_path, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = yaml.safe_load(installed("pretrain", "--config", "pretrain_demo", "--print_config"))
    assert printed["model"]["dim"] == 128
    installed("synth", "mvtec3d", "--out", "raw", "--per_category", "2", "--categories", "2", "--size", "48")
    installed("prep", "mvtec3d", "--root", "raw", "--out", "shards")
    installed("check", "shards")
    installed("inspect", "shards", "--out", "page.html")
    assert "limit of each" in installed("submit", "--help")
    assert "sources:" in installed("prep", "--config", "prep/split_c", "--print_config")
    templates = ("anomaly/report.html.jinja", "anomaly/viewer.js", "configs/published.yaml")
    assert all((site / "dino_depth" / name).is_file() for name in templates)
    code = "import dino_depth, data_prep; print(dino_depth.__file__, data_prep.__file__); "
    code += "print(dino_depth.load_encoder('tiny').dim)"
    where, dim = installed("-P", "-c", code, program=python, HF_HUB_OFFLINE="1").splitlines()
    assert where.count(str(site)) == 2 and dim == "192"


LAYOUTS = ("mvtec3d", "eyecandies", "real_iad_d3", "mvtec_ad", "mvtec_loco", "mvtec_ad2", "visa")


def test_seven_sources_in_their_archives_become_split_c(tmp_path, depth_anything, capsys):
    """Every layout as it is downloaded, through the shipped configuration; then the same interrupted by kill -9."""
    words = ["--config", "prep/split_c", "--pseudo_depth.model", str(depth_anything), "--samples_per_shard", "4"]
    for layout in LAYOUTS:
        root = str(tmp_path / layout)
        options = ["--per_category", "2", "--test_per_category", "4", "--categories", "1", "--size", "64"]
        assert run("synth", layout, "--out", root, "--archive", "true", "--workers", "1", *options) == 0
        assert not list(Path(root).rglob("*.png")) and not list(Path(root).rglob("*.tiff"))
        words += [f"--roots.{layout}", root]
    assert tarfile.is_tarfile(next((tmp_path / "eyecandies").glob("*.zip")))
    assert run("prep", *words, "--dry_run") == 0
    assert capsys.readouterr().out.count("published counts differ") == len(LAYOUTS)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("prep", *words, "--out", str(whole), "--workers", "1") == 0
    assert run("check", str(whole)) == 0 and run("inspect", str(whole), "--out", str(tmp_path / "page.html")) == 0
    manifest = json.loads((whole / "manifest.json").read_text())
    assert list(manifest["sources"]) == list(LAYOUTS) and not any(s["dropped"] for s in manifest["sources"].values())
    assert all(source["synthetic"] for source in manifest["sources"].values())
    # Killed in the middle of the depth and in the middle of the images.
    for done in (2, 7):
        command = [sys.executable, "-m", "dino_depth.cli", "prep", *words, "--out", str(broken), "--workers", "1"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(broken.glob(".progress/*.tar.json"))) < done:
            time.sleep(0.01)
        process.kill()
        assert process.wait() != 0 and not (broken / "manifest.json").exists()
    assert run("prep", *words, "--out", str(broken), "--workers", "2") == 0
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in broken.iterdir())
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in names)


BAD = [
    (["prep", "mvtec4d", "--root", ".", "--out", "o"], 2, "did you mean 'mvtec3d'"),
    (["prep", "mvtec3d", "--root", "empty", "--out", "o"], 3, "empty"),
    (["prep", "mvtec3d", "--root", "nowhere", "--out", "o"], 3, "nowhere"),
    (["prep", "mvtec3d", "--root", "empty"], 2, "out"),
    (["prep"], 2, "no dataset is named"),
    (["synth", "eyecandy", "--out", "o"], 2, "eyecandies"),
    (["synth", "mvtec3d", "--out", "full"], 2, "full"),
    (["check", "nowhere"], 3, "nowhere"),
    (["check", "full"], 3, "manifest.json"),
    (["pretrain", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["pretrain", "--data.shards", "nowhere", "--out", "o"], 3, "nowhere"),
    (["probe", "nowhere", "--shards", "nowhere"], 2, "nowhere"),
    (["export", "nowhere", "--out", "o"], 2, "nowhere"),
    (["demo", "--out", "full"], 2, "full"),
]


@pytest.mark.parametrize("words, code, text", BAD, ids=[" ".join(words) for words, *_ in BAD])
def test_bad_input_is_one_line_and_a_code(tmp_path, monkeypatch, capsys, words, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run(*words) == code
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and error.startswith("dino-depth: ")
    assert not (tmp_path / "o").exists()
