"""What every head must do, found by its file alone, on instances with features, pixels and cameras."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomaly_run import make_sample
from quick_heads import QUICK

from dino_depth.anomaly import heads
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context, Facts
from dino_depth.anomaly.views import NEEDS, Views
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import load_frozen
from dino_depth.inspection.model_folder import read_folder, write_folder

VIEWS, SIDE = 3, 80
CONTEXT = Context(0, torch.device("cpu"))
EVERYTHING = Facts(frozenset({"image", "depth"}), VIEWS, True, 1, layers=frozenset({"image", "depth"}))

every_head = pytest.mark.parametrize("name", heads.names())


def opened(name):
    module = heads.open_head(name)
    return module, module.Config(**QUICK.get(name, {}))


def store(needs=frozenset({"image", "depth"})):
    """Encodes the modalities that are needed, with layers where a head reads them."""
    name, side = ("random:timm:resnet18?layers=1-2-3", 64) if "layers" in needs else ("raw-patches?patch=10", SIDE)
    encoders = [load_frozen(name, modality=part) if part in needs else None for part in ("image", "depth")]
    return FeatureStore(*encoders, side, object_pixels=ForegroundConfig("valid"))


def views(needs, seed=0, bad=False, class_index=0):
    return Views(make_sample(f"{seed:02d}", VIEWS, bad, seed), store(needs | {"image", "depth"}), class_index)


class Strict(Views):
    """Refuses what was not asked for."""

    allowed = frozenset()

    def __getattribute__(self, name):
        owner = {
            "image": "image", "depth": "depth", "layers": "layers", "images": "pixels", "depths": "pixels",
            "foregrounds": "pixels", "pixels": "pixels", "grey": "pixels", "cameras": "geometry",
            "cell_points": "geometry", "cloud": "geometry", "motion": "motion",
        }.get(name)  # fmt: skip
        inside = object.__getattribute__(self, "__dict__").get("_inside", False)
        if owner is None or inside:
            return super().__getattribute__(name)
        allowed = object.__getattribute__(self, "allowed")
        # Features of the other modality may be looked at, of zero channels: nobody encodes them.
        assert owner in allowed or owner in ("image", "depth"), f"{name} was read, needs are {sorted(allowed)}"
        self.__dict__["_inside"] = True
        try:
            return super().__getattribute__(name)
        finally:
            self.__dict__["_inside"] = False


@every_head
def test_a_head_offers_what_the_contract_names(name):
    module, config = opened(name)
    for part in ("check", "fit", "score", "from_state", "title"):
        assert callable(getattr(module, part)), part
    assert module.INFERENCE <= vars(config).keys()
    assert module.needs(config) <= NEEDS
    assert module.title(config).startswith(name) and "\n" not in module.title(config)
    assert isinstance(getattr(parse(EvaluateConfig, ["--head.name", name], "test").head, name), module.Config)


@every_head
def test_maps_are_finite_and_survive_the_heads_state_in_a_file_and_in_a_model(name, tmp_path):
    module, config = opened(name)
    needs = module.needs(config)
    head = module.fit([views(needs)], config, CONTEXT)
    tested = views(needs, seed=5, bad=True)
    maps = module.score(head, tested)
    assert maps
    for values in maps.values():
        assert values.ndim == 3 and len(values) == VIEWS and values.shape[1] == values.shape[2]
        assert values.dtype == torch.float32 and values.isfinite().all() and values.device.type == "cpu"
        assert not values.requires_grad
    file = io.BytesIO()
    torch.save(head.state(), file)
    file.seek(0)
    back = module.from_state(torch.load(file, weights_only=True), CONTEXT.device)
    again = module.fit([views(needs)], config, CONTEXT)
    write_folder(tmp_path, {"head": head.state()})
    kept = read_folder(tmp_path)[0]["head"]
    assert module.Config(**kept["config"]) == config
    for other in (back, again, module.from_state(kept, CONTEXT.device)):
        found = module.score(other, views(needs, seed=5, bad=True))
        assert found.keys() == maps.keys() and all(torch.equal(found[key], maps[key]) for key in maps)
    with pytest.raises(DataError, match=f"not the state of a {name} head") as error:
        module.from_state({}, CONTEXT.device)
    assert "\n" not in str(error.value)


@every_head
def test_a_head_reads_only_what_it_says(name):
    module, config = opened(name)
    needs = module.needs(config)
    kept = store(needs)
    kind = type("Strict", (Strict,), {"allowed": needs})
    train, tested = (kind(make_sample(f"{seed:02d}", VIEWS, seed > 0, seed), kept) for seed in (0, 5))
    maps = module.score(module.fit([train], config, CONTEXT), tested)
    assert all(values.isfinite().all() for values in maps.values())


@every_head
def test_a_training_instance_is_scored_as_if_each_view_were_new_where_a_head_can(name):
    module, config = opened(name)
    if not hasattr(module, "itself"):
        return
    train = views(module.needs(config))
    head = module.fit([train], config, CONTEXT)
    maps, known = module.itself(head, train), module.score(head, train)
    assert maps.keys() == known.keys()
    for key, values in maps.items():
        assert values.shape == known[key].shape and values.dtype == torch.float32 and values.isfinite().all()
        assert values.max() > 0


@every_head
def test_a_head_refuses_before_it_runs_what_it_cannot_have(name):
    module, config = opened(name)
    module.check(config, EVERYTHING)
    needs = module.needs(config)
    for modality in needs & {"image", "depth"}:
        with pytest.raises(ConfigError, match=f"--encoder.{modality} is missing: {name}"):
            module.check(config, Facts(EVERYTHING.encoders - {modality}, VIEWS, True, 1))
    if "geometry" in needs:
        with pytest.raises(ConfigError, match=f"{name} needs calibrated views"):
            module.check(config, Facts(EVERYTHING.encoders, 1, False, 1))


@every_head
def test_a_head_fits_and_scores_several_classes_or_refuses_them(name):
    module, config = opened(name)
    try:
        module.check(config, Facts(EVERYTHING.encoders, VIEWS, True, 1, 2, EVERYTHING.layers))
    except ConfigError as error:
        assert name in str(error)
        return
    needs = module.needs(config)
    head = module.fit([views(needs), views(needs, seed=1, class_index=1)], config, CONTEXT)
    assert all(len(part) == VIEWS for part in module.score(head, views(needs, seed=5, class_index=1)).values())


# Each head in a process of its own, which dies while its second state is being written.
KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_contract as t
from dino_depth.anomaly import resume
from pathlib import Path
resume.EVERY_SECONDS, written, write = 0.0, [], resume.write_state
def dies(path, content):
    write(path.with_suffix(".next") if written else path, content)
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
resume.write_state = dies
ended = {}
for name in t.heads.names():
    child = os.fork()
    if not child:
        t.fit_of(name, Path(sys.argv[2]) / name)
        os._exit(0)
    ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ended))
"""


def fit_of(name, checkpoint):
    module = heads.open_head(name)
    config = module.Config(**({"fusion": True, "fusion_steps": 4} if name == "m3dm" else QUICK.get(name, {})))
    return module, module.fit([views(module.needs(config))], config, Context(0, CONTEXT.device, checkpoint))


def test_a_fit_of_many_steps_survives_sigkill_and_ends_in_the_same_bits(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not found.returncode, found.stderr
    ended = json.loads(found.stdout.splitlines()[-1])
    killed = {name for name, code in ended.items() if code == -signal.SIGKILL}
    assert killed == {"ast", "efficientad", "m3dm", "modmap", "mvad", "sganet"}
    assert all(ended[name] == 0 for name in ended.keys() - killed)
    for name in sorted(killed):
        assert list(tmp_path.glob(f"{name}*"))
        (module, resumed), (_, whole) = fit_of(name, tmp_path / name), fit_of(name, None)
        tested = views(module.needs(resumed.config), seed=5, bad=True)
        maps, expected = module.score(resumed, tested), module.score(whole, tested)
        assert all(torch.equal(maps[key], expected[key]) for key in expected), name


@every_head
def test_an_instance_without_views_is_one_line(name):
    module, config = opened(name)
    with pytest.raises(DataError, match=f"{name}: no training sample") as error:
        module.fit([], config, CONTEXT)
    assert "\n" not in str(error.value)
