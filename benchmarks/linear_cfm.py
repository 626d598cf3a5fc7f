"""What an encoder of depth gives a cross-modal mapping, in seconds: CFM with ridge regressions in place of networks.

    python benchmarks/linear_cfm.py SIM3D --depth tiny random:tiny lite0@224 [--image lite0] [--categories NAME ...]

SIM3D is a tree of ``dino-depth synth sim3d``; ``@`` gives the side of the encoder's input where it is not 392. Each
modality's cells, and which view they are of, predict the other's on the training instance, both standardised; a cell's
score is the cosine distance between what it shows and its prediction. A closed form has no seed and no steps, so
encoders differ by their features alone. ``explained`` is the share of variance predicted on sound test instances.
"""

import argparse
import json
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sganet import CPU, METRICS, scored
from torch import Tensor

from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions, open_benchmark
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.views import Views
from dino_depth.frozen import load_frozen

OTHER = {"image": "depth", "depth": "image"}
MAPS = {"image": ("image",), "depth": ("depth",), "maximum": ("image", "depth")}
SIDE = 392


@dataclass
class Config:
    """Ridge regression: ``penalty`` on standardised inputs, and of whose features the maps are."""

    maps: tuple[str, ...] = ("image", "depth")
    penalty: float = 0.01


@dataclass(frozen=True)
class Mapping:
    """From one modality to the other: means and deviations of both, and weights (inputs, outputs)."""

    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    weights: Tensor

    def both(self, views: Views, modality: str) -> tuple[Tensor, Tensor]:
        """What is predicted of a modality and what it shows, (views, rows, columns, channels) float64."""
        predicted = _standard(_inputs(views, OTHER[modality]), self.inputs) @ self.weights
        return predicted, _standard(getattr(views, modality).double(), self.outputs)


def _inputs(views: Views, modality: str) -> Tensor:
    features = getattr(views, modality).double()
    which = torch.eye(len(features), dtype=torch.float64)[:, None, None].expand(*features.shape[:3], -1)
    return torch.cat([features, which], -1)


def _standard(values: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    return (values - moments[0]) / moments[1]


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean(0), values.std(0) + 1e-6


def needs(_: Config) -> frozenset[str]:
    return frozenset({"image", "depth"})


def fit(train: list[Views], config: Config, _: Context) -> SimpleNamespace:
    mappings = {}
    for name, other in OTHER.items():
        inputs = torch.cat([_inputs(views, other)[views.share > 0] for views in train])
        outputs = torch.cat([getattr(views, name)[views.share > 0] for views in train]).double()
        moments = _moments(inputs), _moments(outputs)
        inputs, outputs = _standard(inputs, moments[0]), _standard(outputs, moments[1])
        penalty = config.penalty * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)
        mappings[name] = Mapping(*moments, weights)
    return SimpleNamespace(mappings=mappings, maps=config.maps)


def score(head: SimpleNamespace, views: Views) -> dict[str, Tensor]:
    return {
        name: (1 - F.cosine_similarity(*head.mappings[name].both(views, name), dim=-1)).float() for name in head.maps
    }


def explained(head: SimpleNamespace, name: str, sound: list[Views]) -> float:
    pairs = [[part[views.share > 0] for part in head.mappings[name].both(views, name)] for views in sound]
    left = sum(float((predicted - shown).square().sum()) for predicted, shown in pairs)
    return 1 - left / sum(float(shown.square().sum()) for _, shown in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--depth", nargs="+", required=True)
    parser.add_argument("--image", default="lite0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--categories", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    image = load_frozen(options.image, modality="image", device=CPU)
    benchmark = open_benchmark(options.root, Sim3dOptions())
    head = SimpleNamespace(needs=needs, fit=fit, score=score)
    for category in options.categories or benchmark.categories:
        truth = [sample.read_truth() for sample in benchmark.samples(category, "test")]
        for spec in options.depth:
            name, _, side = spec.partition("@")
            encoder, sizes = load_frozen(name, modality="depth", device=CPU), (options.size, int(side or SIDE))
            store = FeatureStore(image, encoder, sizes, object_pixels=ForegroundConfig())
            train, test = (
                [Views(sample, store, resident=True) for sample in benchmark.samples(category, split)]
                for split in ("train", "test")
            )
            found = {"object": category, "depth": spec}
            for map_name, maps in MAPS.items():
                figures = scored(head, Config(maps), train, test, truth)
                found |= {f"{map_name} {metric}": round(figures[metric], 4) for metric in METRICS}
            fitted, sound = fit(train, Config(), None), [one for one in test if one.sample.label == "good"]
            found |= {f"{part} explained": round(explained(fitted, part, sound), 3) for part in OTHER}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
