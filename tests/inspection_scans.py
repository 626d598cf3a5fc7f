"""Scans of a rendered part: a knob on a rig, moved, with sensor noise, sound or with one defect of known height."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import trimesh
from scipy.ndimage import uniform_filter
from scipy.spatial import KDTree

from data_prep.synthetic.nuisances import PRESETS, disturb, measure, photograph
from data_prep.synthetic.shots import generator
from data_prep.synthetic.specimen import Instance, damaged_instance, sound_instance, specimen
from dino_depth.anomaly.dataset import Sample, View
from dino_depth.anomaly.geometry import Camera
from dino_depth.depth import DepthMap
from dino_depth.inspection.rig import Rig

MILD = PRESETS["mild"]
SAMPLES = 500_000  # points of a sound surface: a millimetre apart on a part of half a metre


@dataclass(frozen=True)
class Scanner:
    """A rig that stands around a part."""

    size: int = 96
    views: int = 5
    category: str = "star_knob"

    @property
    def subject(self):
        return specimen((7, "scans"), self.category, None, self.size, self.size, self.views, 1)

    @property
    def rig(self) -> Rig:
        camera = self.subject.camera
        return Rig({
            f"view_{place:02d}": Camera(camera.height, camera.width, camera.matrix(), pose)
            for place, pose in enumerate(self.subject.poses, 1)
        })  # fmt: skip

    def good(self, name: str, seed: int) -> Sample:
        random = generator(seed, "good")
        return self.scan(name, sound_instance(self.subject, MILD, random), random)

    def bad(self, name: str, kind: str, height: float, seed: int) -> tuple[Sample, float]:
        """A scan, and the height of its defect, millimetres."""
        random = generator(seed, "bad")
        instance = self.damaged(kind, height, random)
        return self.scan(name, instance, random), 1000 * height * self.subject.scale

    def damaged(self, kind: str, height: float, random: np.random.Generator) -> Instance:
        return damaged_instance(self.subject, kind, replace(MILD, amplitude=height), 0.003, random)

    def truth(self, kind: str, height: float, seed: int) -> tuple[float, np.ndarray]:
        """Of the defect of such a bad scan: how far what is seen of it lies from the sound surface, and where.

        Returns:
            The largest mean over 3 x 3 pixels of any view, millimetres, and its place (3,) in the part's frame, mm.
        """
        subject, instance = self.subject, self.damaged(kind, height, generator(seed, "bad"))
        sound = trimesh.Trimesh(subject.scale * subject.vertices, subject.faces, process=False)
        surface = KDTree(trimesh.sample.sample_surface(sound, SAMPLES, seed=0)[0])
        best = 0.0, np.zeros(3)
        for place, pose in enumerate(subject.poses):
            view, pose = instance.view(place), np.linalg.inv(instance.placement) @ pose
            depth = np.where(view.seen.part, view.seen.depth, 0)
            points = subject.camera.rays() * depth[..., None] @ pose[:3, :3].T + pose[:3, 3]
            away = np.zeros(depth.shape)
            away[view.changed] = surface.query(points[view.changed])[0]
            away = uniform_filter(away, 3)
            at = np.unravel_index(away.argmax(), away.shape)
            best = max(best, (1000 * away[at], 1000 * points[at]), key=lambda found: found[0])
        return best

    def scan(self, name: str, instance: Instance, random: np.random.Generator) -> Sample:
        subject, views = self.subject, []
        for place, (view, camera) in enumerate(self.rig.cameras.items()):
            shown = instance.view(place)
            disturbance = disturb(shown.seen, subject.camera, MILD, random)
            rooms = generator(place), generator(place, name)
            image = photograph(
                shown.seen, subject.camera, shown.albedo, subject.material.gloss, rooms, disturbance, MILD, random
            )
            depth = measure(shown.seen, subject.camera, subject.scale, disturbance, MILD, random)
            views.append(View(view, partial(_given, image), partial(_given, DepthMap.from_values(depth)), camera))
        return Sample("part", name, "test", "unknown", None, tuple(views), partial(_given, None))


def arrays(sample: Sample) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images and depths, metres, 0 where missing."""
    return [view.read_image() for view in sample.views], [view.read_depth().depth for view in sample.views]


def _given(value):
    return value
