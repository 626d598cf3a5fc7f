"""What does not render works without the packages of the extra ``render``; what does says in one line what it needs."""

import ast
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RENDERING = {"embreex", "manifold3d", "trimesh"}
IMPORTERS = {"data_prep/synthetic/engines.py", "data_prep/synthetic/meshes.py"}

# Run in processes of their own: in this one other tests have loaded what is blocked there.
BLOCKED = f"""
import importlib, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {RENDERING}:
            raise ImportError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
WITHOUT = f"""{BLOCKED}
import data_prep, dino_depth
from dino_depth import cli
from dino_depth.errors import ConfigError

def modules(package):
    root = Path(package.__path__[0])
    for path in root.rglob("*.py"):
        words = (root.name, *path.relative_to(root).with_suffix("").parts)
        yield ".".join(words).removesuffix(".__init__")

renders = ("dino_depth.bench.rendered", "dino_depth.bench.objects", "data_prep.synthetic.")
light = ["data_prep.synthetic.plan", "data_prep.synthetic.meshes", "data_prep.synthetic.layouts"]
for name in [*modules(dino_depth), *modules(data_prep), "dino_depth.slurm.submit"]:
    if name.startswith(renders) and name not in light:
        continue
    importlib.import_module(name)
for command in cli.COMMANDS.values():
    getattr(importlib.import_module(command.module), command.function)
assert cli.main(["synth", "--help"]) == 0 and cli.main(["demo", "--help"]) == 0
print("imported")
Path("demo").mkdir()
Path("demo/.dino-depth-demo").touch()
Path("parts").mkdir()
Path("parts/part.stl").touch()
commands = [["synth", "mvtec3d", "--out", "raw"], ["synth", "sim3d", "--out", "raw"], ["demo"]]
commands += [["bench", "raw-patches", "--data", f"[{{data}}]"] for data in ("synthetic", "families", "parts")]
print([cli.main(words) for words in commands], Path("demo/.dino-depth-demo").exists(), Path("raw").exists())
"""


def test_without_the_extra_all_but_rendering_works(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["imported", "[2, 2, 2, 2, 2, 2] True False"], done.stdout[-400:]
    said = [line for line in done.stderr.splitlines() if line.startswith("dino-depth: ")]
    assert len(said) == 6 and all("pip install 'dino-depth[render]'" in line for line in said), done.stderr


TRAINED = f"""{BLOCKED}
if __name__ == "__main__":  # workers begin with this file
    from dino_depth.cli import main
    small = "--config pretrain_demo --data.splits [] --data.workers 1 --train.batch 2 --train.steps 2 "
    small += "--crops.global_size 42 --crops.local_size 28 --crops.local_crops 2"
    for words in (
        "prep folder --root {ROOT}/tests/sensor --out shards --workers 2 --samples_per_shard 2", "check shards",
        "inspect shards --out page.html", f"pretrain {{small}} --data.shards shards --out run",
        "export run --out model", "check shards",
    ):
        assert main(words.split()) == 0, words
    loaded = {RENDERING} | {{"data_prep.synthetic"}}
    print("trained", sorted(loaded & set(sys.modules)))
"""


def test_without_the_extra_an_encoder_is_trained_and_exported(tmp_path):
    """From sensor files to a model folder; nothing of the package that renders is so much as imported."""
    (tmp_path / "train.py").write_text(TRAINED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained []", done.stdout[-400:]
    assert (tmp_path / "model" / "transformers" / "model.safetensors").is_file()


def test_one_place_imports_each_package():
    for path in [*ROOT.glob("data_prep/**/*.py"), *ROOT.glob("dino_depth/**/*.py")]:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert not found & RENDERING or str(path.relative_to(ROOT)) in IMPORTERS, path


@pytest.fixture
def required() -> dict[str, dict[str, SpecifierSet]]:
    """Versions of setup.cfg by extra and package; the extra "" is what is always installed."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    lines = {extra: map(Requirement, text.strip().splitlines()) for extra, text in listed.items()}
    return {extra: {canonicalize_name(r.name): r.specifier for r in found} for extra, found in lines.items()}


def test_the_extra_is_what_is_imported(required):
    assert set(required["render"]) == RENDERING and not RENDERING & set(required[""])


def test_every_dependency_has_a_lowest_version(required):
    for extra, packages in required.items():
        assert all(str(allowed).startswith(">=") for allowed in packages.values()), extra


def test_the_constraints_are_versions_that_are_allowed(required):
    first, *lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert re.match(r"# Tested together on 20\d\d-\d\d-\d\d: Python 3\.\d+\.\d+, ", first)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for extra in ("", "render", "test", "onnx", "remote"):  # what make test installs
        for name, allowed in required[extra].items():
            pin = pinned.get(name)
            assert pin and allowed.contains(pin), f"constraints.txt pins {name} to {pin}, setup.cfg says {allowed}"
