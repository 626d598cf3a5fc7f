"""A fitted model that decides about scans: from arrays in memory to a score, a decision and defects in millimetres.

    inspector = Inspector.load("MODEL")
    inspection = inspector.predict(images, depths)
    inspection.anomalous, inspection.score, inspection.defects

``dino-depth fit``, ``predict`` and ``calibrate`` are thin callers of this module. A scan goes the way of ``evaluate``:
``dino_depth.anomaly.model.Model`` from views to maps, ``dino_depth.anomaly.volume`` from maps to a volume.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dino_depth import __version__
from dino_depth.anomaly.config import Encoders
from dino_depth.anomaly.dataset import Sample, View, given, held
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.fitted import fitted_head
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context, Facts, open_head
from dino_depth.anomaly.model import Model, PrepareConfig, Scores, fit_model
from dino_depth.anomaly.registration import Cloud, Motion, RegistrationConfig
from dino_depth.anomaly.views import Standard, Views
from dino_depth.anomaly.volume import ScoredVolume, VoxelConfig, accumulate, combine
from dino_depth.depth import DepthMap
from dino_depth.device import pick_device
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import load_frozen
from dino_depth.inspection.bundle import bundled_spec, copy_encoder
from dino_depth.inspection.decision import Decision, DecisionConfig, decide
from dino_depth.inspection.defects import Defect, DefectConfig, Found, find_defects, pixel_pitch
from dino_depth.inspection.model_folder import MODEL, read_folder, replace_values, write_folder
from dino_depth.inspection.parts import CATEGORY
from dino_depth.inspection.rig import Rig, rig_json, rig_of

__all__ = ["Inspection", "InspectionConfig", "Inspector"]

FARTHER = 1.5  # times the distance of training, or nearer: a wrong unit, or no part
FINE = 1.5  # voxels of the distance of neighbouring pixels
COVERED = 0.3  # of the pixels that the part covered in training: less is no part


@dataclass
class InspectionVolume(VoxelConfig):
    """The grid of the volume, and how modalities meet.

    Attributes:
        size_mm: edge of a voxel, millimetres; empty: half as much again as neighbouring pixels are apart on the part.
        extent: ``union`` is the bounding box of all points and ``margin_mm`` around it; ``cube`` is one cube of
            ``cube_mm`` around the origin of the world.
        margin_mm: of ``union``, millimetres.
        cube_mm: edge of ``cube``, millimetres.
        aggregation: of the modalities' maps before they are projected.
    """

    size_mm: float | None = None
    extent: Literal["union", "cube"] = "union"
    margin_mm: float = 0.0


@dataclass
class InspectionConfig:
    """What a model is, besides its head.

    Attributes:
        encoder: the frozen encoders.
        prepare: what is done around the head.
        foreground: which pixels are the part.
        volume: the grid of voxels, and how modalities meet.
        decision: how many false alarms there may be.
        defects: what counts as one.
    """

    encoder: Encoders = field(default_factory=Encoders)
    prepare: PrepareConfig = field(default_factory=lambda: PrepareConfig(RegistrationConfig("icp")))
    foreground: ForegroundConfig = field(default_factory=ForegroundConfig)
    volume: InspectionVolume = field(default_factory=InspectionVolume)
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    defects: DefectConfig = field(default_factory=DefectConfig)

    def around(self) -> "InspectionConfig":
        """These settings alone, where a command adds others."""
        return InspectionConfig(**{part.name: getattr(self, part.name) for part in fields(InspectionConfig)})


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a model says of a scan.

    Attributes:
        name: of the scan.
        score: larger is more anomalous.
        decision: that was in force.
        anomalous: whether the score exceeds the threshold, or the part could not be registered; None where the model
            has no threshold.
        reasons: for it, in words.
        found: regions that stand out, and where they lie.
        motion: from the scan's world to the part's frame; None without registration.
        volume: in the part's frame; None for a single view without a camera.
        pixel_maps: (height, width) float32 of each view, 0 off the part.
        views: the scan.
        seconds: by stage.
    """

    name: str
    score: float
    decision: Decision
    anomalous: bool | None
    reasons: tuple[str, ...]
    found: Found
    motion: Motion | None
    volume: ScoredVolume | None
    pixel_maps: tuple[np.ndarray, ...]
    views: Views
    seconds: dict[str, float]

    @property
    def defects(self) -> tuple[Defect, ...]:
        """Regions that stand out, the highest score first."""
        return self.found.defects

    def facts(self) -> dict[str, Any]:
        """What JSON can hold; lengths in millimetres, in the part's frame."""
        return {
            "name": self.name,
            "anomalous": self.anomalous,
            "score": self.score,
            "threshold": self.decision.threshold,
            "guarantee": self.decision.told(),
            "reasons": list(self.reasons),
            "defects": [asdict(defect) for defect in self.defects],
            "registration": None if self.motion is None else self.motion.facts(),
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
        }


@dataclass(frozen=True, eq=False)
class Inspector:
    """A fitted model with its rig and its decision.

    Attributes:
        model: from views to maps.
        head: name of the head.
        store: gives features.
        rig: whose scans it takes.
        names: of the views, in order.
        config: what is done around the head.
        expected: of each view in training: median distance of the part, metres, and the pixels it covers.
        decision: where scores become anomalous.
        provenance: what it was made from.
    """

    model: Model
    head: str
    store: FeatureStore
    rig: Rig
    names: tuple[str, ...]
    config: InspectionConfig
    expected: dict[str, list[float]]
    decision: Decision
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, rig: Rig, parts: Sequence[Sample], head: str, settings: Any, config: InspectionConfig, *,
        seed: int = 0, device: str = "auto", scratch: Path | None = None,
    ) -> "Inspector":  # fmt: skip
        """Fits on good parts; ``calibrated`` with others gives it a decision with a guarantee.

        Args:
            rig: of all parts.
            parts: to fit on, at least one.
            head: name of the head.
            settings: of the head, a ``Config`` of its module.
            scratch: folder in which a killed fit is continued; None keeps nothing.

        Raises:
            ConfigError: a setting that cannot work with such parts.
            DataError: a part cannot be read.
        """
        if not parts:
            raise DataError("no part to fit on")
        chosen, method = pick_device(device), open_head(head)
        cameras = all(view.camera is not None for view in parts[0].views)
        if config.prepare.registration.method != "none" and not cameras:
            raise ConfigError("prepare.registration.method icp needs cameras: these parts have none; use none")
        encoders = frozenset(name for name in ("image", "depth") if getattr(config.encoder, name))
        facts = Facts(encoders, len(parts[0].views), cameras, len(parts))
        method.check(settings, facts)
        store = _store(config, method.needs(settings), chosen)
        layered = frozenset(name for name, encoder in store.encoders.items() if encoder.to_layers is not None)
        method.check(settings, replace(facts, layers=layered))
        train = [Views(held(sample), store, resident=True) for sample in parts]

        def fit(instances, settings, context):
            return fitted_head(method, scratch, settings, context, instances)[0]

        context = Context(seed, chosen)
        model = fit_model(method, settings, config.prepare, context, train, None if scratch is None else fit)
        if config.volume.size_mm is None and cameras:
            pitch = np.median([pixel_pitch(views) for views in train])
            config = replace(config, volume=replace(config.volume, size_mm=float(f"{1000 * FINE * pitch:.2g}")))
        made = cls(
            model, head, store, rig, tuple(view.name for view in parts[0].views), config, _expected(train),
            decide({}, config.decision), {
                "parts": [sample.name for sample in parts],
                "digests": [views.digest({"pixels"})[:16] for views in train],
                "seed": seed,
            },
        )  # fmt: skip
        return replace(made, decision=decide({}, config.decision, made._itself(train[0])))

    @property
    def title(self) -> str:
        """What the method is, as tables call it."""
        return self.model.method.title(self.model.settings)

    def calibrated(self, parts: Sequence[Sample], advance: Callable[[], None] = lambda: None) -> "Inspector":
        """The model with good parts added to those that its decision rests on.

        Args:
            advance: called after each part.

        Raises:
            DataError: a part cannot be scored, was fitted on, or counts already.
        """
        scores = dict(self.decision.scores)
        for sample in parts:
            views = self.views(sample)
            key = views.digest({"pixels"})[:16]
            if key in self.provenance.get("digests", []):
                raise DataError(f"{sample.name}: the model was fitted on this part: it cannot calibrate it")
            if key in scores:
                raise DataError(f"{sample.name}: these pixels are in the calibration already")
            score, _, volume, maps = self._scored(views, {})
            scores[key] = score, _highest(volume, maps)
            advance()
        return replace(self, decision=decide(scores, self.decision.config, self.decision.heuristic))

    def predict(
        self,
        images: Sequence[np.ndarray] | Mapping[str, np.ndarray],
        depths: Sequence[np.ndarray] | Mapping[str, np.ndarray],
        name: str = "scan",
    ) -> Inspection:
        """Inspects a scan.

        Args:
            images: (height, width) or (height, width, 3) uint8 of each view, in the order of ``names`` or by name.
            depths: (height, width) of each view, metres; 0, NaN and infinity are missing.
            name: for messages and results.

        Raises:
            DataError: a view is missing or of another size, nothing is measured, or the part is not in the scan.
        """
        return self.inspect(self._sample(images, depths, name))

    def inspect(self, sample: Sample) -> Inspection:
        """As ``predict``, for a sample of ``dino_depth.inspection.parts``."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"):
            views = self.views(sample)
        score, scores, volume, maps = self._scored(views, seconds)
        motion = scores.prepared.motion
        with _timed(seconds, "defects"):
            limit = self.decision.map_threshold
            found = find_defects(self.model, scores.prepared, maps, volume, limit, self.config.defects)
        anomalous, reasons = self.decision.of(score), []
        if anomalous:
            reasons.append(f"score {score:.4g} exceeds {self.decision.threshold:.4g}")
        if motion is not None and motion.failed:
            anomalous = True
            reasons.append(f"not where the part can lie: {motion.failed}")
        return Inspection(
            sample.name, score, self.decision, anomalous, tuple(reasons), found, motion, volume, maps, views,
            seconds,
        )  # fmt: skip

    def views(self, sample: Sample) -> Views:
        """The scan in memory, after all that can be told from it alone.

        Raises:
            DataError: a view is missing or cannot be read, or the scan does not show the part as training did.
        """
        names = tuple(view.name for view in sample.views)
        if names != self.names:
            raise DataError(f"{sample.name}: views {', '.join(names)}, the model has {', '.join(self.names)}")
        views = Views(held(sample), self.store, resident=True)
        found = _expected([views])
        for name, before, now in zip(names, self.expected["distance"], found["distance"], strict=True):
            if not 1 / FARTHER <= now / before <= FARTHER:
                raise DataError(
                    f"{sample.name}, view {name}: what it shows is {now:.4g} m away, {now / before:.3g} times "
                    f"as far as the training part ({before:.4g} m): another unit of depth, or no part"
                )
        covered = sum(found["pixels"]) / sum(self.expected["pixels"])
        if covered < COVERED:
            raise DataError(
                f"{sample.name}: the part is not in it: it covers {100 * covered:.0f} % of the training part's pixels"
            )
        return views

    def _scored(
        self, views: Views, seconds: dict[str, float]
    ) -> tuple[float, Scores, ScoredVolume | None, tuple[np.ndarray, ...]]:
        with _timed(seconds, "encode"):
            if self.store.encoders:
                views.share  # noqa: B018  everything is encoded here, for the clock
        with _timed(seconds, "score"):
            scores = self.model.score(views)
        with _timed(seconds, "volume"):
            maps = tuple(
                combine(scores.maps, view, mask, self.config.volume.aggregation)
                for view, mask in enumerate(views.foregrounds)
            )
            volume = self._volume(views, scores)
        if scores.instance is not None:
            return scores.instance, scores, volume, maps
        return _highest(volume, maps), scores, volume, maps

    def _volume(self, views: Views, scores: Scores) -> ScoredVolume | None:
        """In the part's frame: the cameras stand where they stood when the training part was scanned."""
        if any(view.camera is None for view in views.sample.views):
            return None
        sample, motion = views.sample, scores.prepared.motion
        if motion is not None:
            moved = [
                replace(view, camera=replace(view.camera, camera_to_world=motion.matrix @ view.camera.camera_to_world))
                for view in sample.views
            ]
            sample = replace(sample, views=tuple(moved))
        return accumulate(scores.maps, sample, views.depths, views.foregrounds, self.config.volume)

    def _itself(self, views: Views) -> float | None:
        """The score of the training part if each of its views were new; None of heads that cannot tell."""
        maps = self.model.itself(views)
        if maps is None or len(views) < 2:
            return None
        scored = [combine(maps, view, mask, self.config.volume.aggregation)[mask]
                  for view, mask in enumerate(views.foregrounds)]  # fmt: skip
        return float(max(part.max() for part in scored))

    def _sample(self, images: Any, depths: Any, name: str) -> Sample:
        checked = []
        for kind, parts in (("images", images), ("depths", depths)):
            if isinstance(parts, Mapping):
                if missing := [view for view in self.names if view not in parts]:
                    raise DataError(f"{name}: {kind} lack the view {missing[0]}")
                parts = [parts[view] for view in self.names]
            if len(parts) != len(self.names):
                raise DataError(f"{name}: {len(parts)} {kind}, the model has {len(self.names)} views")
            checked.append(parts)
        views = []
        for view, image, depth in zip(self.names, *checked, strict=True):
            camera, image = self.rig.cameras.get(view), np.asarray(image)
            depth_map = DepthMap.from_values(np.asarray(depth)) if np.any(np.isfinite(depth)) else None
            if depth_map is None:
                raise DataError(f"{name}, view {view}: no depth is measured")
            sizes = {image.shape[:2], depth_map.depth.shape} | ({(camera.height, camera.width)} if camera else set())
            if len(sizes) > 1:
                told = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
                raise DataError(f"{name}, view {view}: image, depth and camera differ in size: {told}")
            views.append(View(view, given(image), given(depth_map), camera))
        return Sample(CATEGORY, name, "test", "unknown", None, tuple(views), given(None))

    def save(self, folder: str | Path, *, bundle: bool = False):
        """Writes the model; a folder without model.json is none.

        Args:
            bundle: copies the encoders' weights into it, so that it needs neither the Hub nor other folders.

        Raises:
            ConfigError: the folder holds something else, or an encoder cannot be bundled.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / MODEL).is_file():
            raise ConfigError(f"--out {folder}: is no model and not empty; name a new folder")
        bundled = {}
        for modality in self.store.encoders if bundle else ():
            spec = getattr(self.config.encoder, modality)
            if (copied := copy_encoder(spec, modality, folder)) is not None:
                bundled[modality] = copied
        model = self.model
        write_folder(
            folder,
            {
                "versions": {"dino_depth": __version__, "torch": torch.__version__},
                "head": self.head,
                "config": asdict(self.config),
                "views": list(self.names),
                "rig": rig_json(self.rig),
                "encoders": {name: part.fingerprint for name, part in self.store.encoders.items()},
                "bundled": bundled,
                "decision": self.decision.state(),
                "expected": self.expected,
                "provenance": self.provenance,
                "state": {
                    "head": model.head.state(),
                    "standard": None if model.standard is None else model.standard.statistics,
                    "targets": None if model.targets is None else [asdict(target) for target in model.targets],
                },
            },
        )

    def save_decision(self, folder: str | Path):
        """Replaces the decision of a model that was saved, in one step."""
        _, plain = read_folder(Path(folder))
        replace_values(Path(folder), plain | {"decision": self.decision.state()})

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> "Inspector":
        """A model that was saved; on the same kind of device it gives the same bits.

        Raises:
            ConfigError: an encoder, a package or the device is not there.
            DataError: it is no model, of another version, truncated, or an encoder's weights are others than in
                training.
        """
        folder, chosen = Path(folder), pick_device(device)
        values, _ = read_folder(folder)
        try:
            method = open_head(values["head"])
            config = _config(values["config"])
            settings = method.Config(**values["state"]["head"]["config"])
            specs = {
                name: bundled_spec(folder, values["bundled"][name]) if name in values["bundled"] else spec
                for name, spec in (("image", config.encoder.image), ("depth", config.encoder.depth))
            }
            store = _store(replace(config, encoder=replace(config.encoder, **specs)), method.needs(settings), chosen)
            for name, encoder in store.encoders.items():
                if encoder.fingerprint != values["encoders"][name]:
                    raise DataError(
                        f"{folder}: encoder.{name} {specs[name]} has other weights or runs in other versions than when "
                        "the model was fitted: fit again, or keep the weights in the model with --bundle"
                    )
            head = method.from_state(values["state"]["head"], chosen)
            standard, targets = values["state"]["standard"], values["state"]["targets"]
            model = Model(
                method, head, settings, config.prepare, None if standard is None else Standard(standard),
                None if targets is None else tuple(Cloud(**target) for target in targets),
            )  # fmt: skip
            return cls(
                model, values["head"], store, rig_of(values["rig"]), tuple(values["views"]), config,
                values["expected"], Decision.from_state(values["decision"]), values["provenance"],
            )  # fmt: skip
        except (KeyError, TypeError, ModuleNotFoundError) as error:
            raise DataError(f"{folder / MODEL}: not as fit writes it: {type(error).__name__} {error}") from error


def _highest(volume: ScoredVolume | None, maps: Sequence[np.ndarray]) -> float:
    return max(float(part.max()) for part in maps) if volume is None else volume.instance_score


def _store(config: InspectionConfig, needs: frozenset[str], device: torch.device) -> FeatureStore:
    """What encodes views; nothing is cached, as no scan comes twice."""
    encoder = config.encoder
    encoders = {
        modality: load_frozen(spec, modality=modality, device=device) if spec and modality in needs else None
        for modality, spec in (("image", encoder.image), ("depth", encoder.depth))
    }
    sizes = (encoder.size, encoder.depth_size or encoder.size)
    return FeatureStore(
        encoders["image"], encoders["depth"], sizes, object_pixels=config.foreground, batch=encoder.batch
    )


def _config(state: Mapping[str, Any]) -> InspectionConfig:
    """The settings that ``asdict`` took apart."""
    kept = dict(state)
    prepare = dict(kept["prepare"])
    return InspectionConfig(
        Encoders(**kept["encoder"]),
        PrepareConfig(**{**prepare, "registration": RegistrationConfig(**prepare["registration"])}),
        ForegroundConfig(**kept["foreground"]),
        InspectionVolume(**kept["volume"]),
        DecisionConfig(**kept["decision"]),
        DefectConfig(**kept["defects"]),
    )


def _expected(parts: Sequence[Views]) -> dict[str, list[float]]:
    """Of each view, median over the parts: median distance, metres, and the pixels of the foreground."""
    distances, pixels = [], []
    for views in parts:
        pairs = list(zip(views.depths, views.foregrounds, strict=True))
        distances.append([float(np.median(depth.depth[mask])) for depth, mask in pairs])
        pixels.append([float(np.count_nonzero(mask)) for _, mask in pairs])
    return {"distance": np.median(distances, 0).tolist(), "pixels": np.median(pixels, 0).tolist()}


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
