"""SiM3D: objects seen from 12 or 36 calibrated views, trained on one instance, real or rendered from CAD.

    ROOT/<class>/<class>_real/depth/<stem>.npy     rgb/<stem>_2.png          the real training instance
                 <class>_synth/DEPTH/<s>_depth.exr RGB/<s>_2.png             the synthetic one
                 <instance>/depth/<stem>.npy       rgb/<stem>_2.png          tested; anomalous if "bad" is in its name
                 decoding: sim3d_views.py; calibration and ground truth: calibration.py, truth.py

The layout is known from public loaders; what the numbers mean is partly a guess, and each guess is a setting that is
checked against the data, where files are listed or, if that needs depth, by ``Benchmark.check_category``.

A view's id is its place in the order of the stems. Real stems may count 1, 2, ..., 10 and synthetic ones 001, 002, ...,
010: sorted as text they would pair view 10 with view 2, so numbers are compared as numbers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Literal

import yaml

from data_prep.archives import RawFile, hidden
from data_prep.tree import refuse_links_out
from dino_depth.anomaly.benchmarks.calibration import (
    CalibrationOptions,
    Thinned,
    check_overlap,
    check_truth,
    read_cameras,
    rival_settings,
    thin,
)
from dino_depth.anomaly.benchmarks.sim3d_views import read_depth, read_image
from dino_depth.anomaly.benchmarks.truth import TruthOptions, read_truth
from dino_depth.anomaly.dataset import Benchmark, Sample, Split, View, named
from dino_depth.anomaly.geometry import Camera
from dino_depth.errors import DataError
from dino_depth.settings import load_yaml

__all__ = ["Sim3dOptions", "open_benchmark"]

TRAINING = {"real2real": "real", "synth2real": "synth"}
log = getLogger("dino_depth")


@dataclass
class Sim3dOptions:
    """The setup, and what is unknown about SiM3D's files.

    Attributes:
        setup: what is trained on; tested is always on real instances.
        include_train_nominal: the real training instance is one of the good test samples as well, as the counts behind
            the baselines copied into the published tables imply.
        view_order: of the stems: natural compares numbers as numbers, lexicographic compares characters.
        view_map: YAML file {class: {synthetic stem: real stem}} that pairs the views; empty: by their order.
        image_suffix: what follows the stem of a view in the name of its image.
        anomalous: what the name of an anomalous instance contains after the name of its class.
        depth_unit: of .npy files; auto takes what makes the median depth plausible.
        synthetic_unit: of .exr files.
        calibration: what the numbers of calibration files mean.
        truth: which ground truth is read.
    """

    setup: Literal["real2real", "synth2real"] = "real2real"
    include_train_nominal: bool = False
    view_order: Literal["natural", "lexicographic"] = "natural"
    view_map: str = ""
    image_suffix: str = "_2"
    anomalous: str = "bad"
    depth_unit: Literal["auto", "m", "mm"] = "auto"
    synthetic_unit: Literal["auto", "m", "mm"] = "auto"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    truth: TruthOptions = field(default_factory=TruthOptions)


@dataclass(frozen=True)
class Files:
    """The files of an instance, in the order of the views."""

    folder: Path
    stems: tuple[str, ...]
    depth: tuple[RawFile, ...]
    image: tuple[RawFile, ...]


def open_benchmark(root: str, options: Sim3dOptions) -> Benchmark:
    """SiM3D below a folder.

    Raises:
        DataError: no folder in ``root`` is a class, which holds ``<class>_real`` or ``<class>_synth``, or a link leads
            out of ``root``.
    """
    if not Path(root).is_dir():
        raise DataError(f"root {root} is not a folder")
    refuse_links_out(root)
    classes = [
        folder.name
        for folder in _folders(Path(root))
        if any((folder / f"{folder.name}_{kind}").is_dir() for kind in TRAINING.values())
    ]
    if not classes:
        raise DataError(f"{root} is not a sim3d tree: no <class>/<class>_real or <class>/<class>_synth in it")
    listing, check = (partial(function, Path(root), options) for function in (_list_class, _check_class))
    return Benchmark("sim3d", options.setup, tuple(classes), listing, check)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not hidden(path.name))


def _list_class(root: Path, options: Sim3dOptions, category: str) -> list[Sample]:
    """Every sample of a class: its training instance, and the tested ones by name."""
    training, tested = _instances(root, options, category)
    cameras = _cameras(root, options, category, tested[0])
    samples = [_sample(category, training, "train", "good", cameras, options)]
    if options.include_train_nominal:
        real = _files(root / category / f"{category}_real", options)
        samples.append(_sample(category, real, "test", "good", cameras, options))
    for files in tested:
        anomalous = options.anomalous in files.folder.name.removeprefix(category)
        samples.append(_sample(category, files, "test", "anomalous" if anomalous else "good", cameras, options))
    return samples


def _instances(root: Path, options: Sim3dOptions, category: str) -> tuple[Files, list[Files]]:
    """The training instance, whose views are in the order of the real ones, and the tested instances."""
    folder = root / category
    chosen = folder / f"{category}_{TRAINING[options.setup]}"
    reserved = {f"{category}_{kind}" for kind in TRAINING.values()}
    if not chosen.is_dir():
        raise DataError(f"{chosen} is not there: sim3d.setup {options.setup} trains on it")
    tested = [_files(path, options) for path in _folders(folder) if path.name not in reserved]
    if not tested:
        raise DataError(f"{folder}: no instance to test beside {' and '.join(sorted(reserved))}")
    training = _files(chosen, options)
    if options.setup == "synth2real":
        training = _paired(training, tested[0], category, options)
    for files in [training] * (options.setup == "real2real") + tested[1:]:
        _same_views(files, tested[0])
    return training, tested


def _files(folder: Path, options: Sim3dOptions) -> Files:
    """Raises DataError where a folder, a depth file or the image of a view is missing."""
    inside = {path.name.lower(): path for path in _folders(folder)}
    for name in ("depth", "rgb"):
        if name not in inside:
            raise DataError(f"{folder} is no instance: no folder {name} in it")
    found = {}
    for path in inside["depth"].iterdir():
        if path.suffix.lower() in (".npy", ".exr") and not hidden(path.name):
            found[path.stem.removesuffix("_depth")] = RawFile(str(folder), f"{inside['depth'].name}/{path.name}")
    if not found:
        raise DataError(f"{inside['depth']}: no .npy or .exr file")
    stems = sorted(found, key=_natural if options.view_order == "natural" else None)
    images = [f"{inside['rgb'].name}/{stem}{options.image_suffix}.png" for stem in stems]
    for stem, image in zip(stems, images, strict=True):
        if not (folder / image).is_file():
            raise DataError(f"{folder}: view {stem} has no {image} (sim3d.image_suffix {options.image_suffix!r})")
    return Files(
        folder, tuple(stems), tuple(found[stem] for stem in stems), tuple(RawFile(str(folder), name) for name in images)
    )


def _natural(stem: str) -> list[tuple[int, int, str]]:
    """A key that orders runs of digits by their value."""
    parts = re.findall(r"\d+|\D+", stem)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _numbers(stems: Sequence[str]) -> list[int] | None:
    """The last number of each stem, counted from the smallest; None where one has none or two are equal."""
    found = [re.findall(r"\d+", stem) for stem in stems]
    if not all(found):
        return None
    numbers = [int(digits[-1]) for digits in found]
    return [number - min(numbers) for number in numbers] if len(set(numbers)) == len(numbers) else None


def _same_views(files: Files, reference: Files):
    """Refuses an instance whose views are not those of another real one."""
    if files.stems == reference.stems:
        return
    numbers, expected = _numbers(files.stems), _numbers(reference.stems)
    # Stems that carry the instance's name differ; their numbers do not.
    if len(files.stems) == len(reference.stems) and (numbers is None or numbers == expected):
        return
    missing = sorted(set(reference.stems) - set(files.stems), key=_natural)
    raise DataError(
        f"{files.folder} has {len(files.stems)} views, {reference.folder} {len(reference.stems)}"
        + (f": it lacks {', '.join(missing[:4])}" if missing else "")
    )


def _paired(synthetic: Files, real: Files, category: str, options: Sim3dOptions) -> Files:
    """The synthetic instance with its views in the order of the real ones."""
    if options.view_map:
        pairs = _view_map(Path(options.view_map), category)
        by_real = {real_stem: stem for stem, real_stem in pairs.items()}
        wrong = sorted(set(pairs) - set(synthetic.stems)) + sorted(set(real.stems) - set(by_real))
        if wrong:
            raise DataError(f"{options.view_map} {category}: does not pair view {wrong[0]} (sim3d.view_map)")
        order = [synthetic.stems.index(by_real[stem]) for stem in real.stems]
    else:
        if len(synthetic.stems) != len(real.stems):
            raise DataError(
                f"{synthetic.folder} has {len(synthetic.stems)} views, {real.folder} {len(real.stems)}: pair them with "
                "sim3d.view_map"
            )
        mine, others = _numbers(synthetic.stems), _numbers(real.stems)
        if mine and others and set(mine) == set(others) and mine != others:
            place = next(place for place, pair in enumerate(zip(mine, others, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"{synthetic.folder}: sim3d.view_order {options.view_order} pairs view {synthetic.stems[place]} with "
                f"the real view {real.stems[place]}; natural pairs equal numbers, or give sim3d.view_map"
            )
        order = range(len(real.stems))
    return replace(
        synthetic,
        **{key: tuple(getattr(synthetic, key)[place] for place in order) for key in ("stems", "depth", "image")},
    )


def _view_map(path: Path, category: str) -> dict[str, str]:
    try:
        pairs = load_yaml(path.read_text(encoding="utf-8"))[category]
        return {str(stem): str(other) for stem, other in pairs.items()}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise DataError(f"{path}: no pairs of views of {category} (sim3d.view_map): {reason}") from error


def _cameras(root: Path, options: Sim3dOptions, category: str, real: Files) -> tuple[Camera, ...]:
    """One camera for each view, in the order of the real stems."""
    read = read_cameras([root / category, root], options.calibration)
    by_name = dict(read)
    if set(real.stems) <= set(by_name):
        return tuple(by_name[stem] for stem in real.stems)
    if len(read) != len(real.stems):
        raise DataError(f"{real.folder} has {len(real.stems)} views, its calibration {len(read)} cameras")
    return tuple(camera for _, camera in read)


def _sample(
    category: str, files: Files, split: Split, label: str, cameras: tuple[Camera, ...], options: Sim3dOptions
) -> Sample:
    views = tuple(
        View(stem, partial(read_image, image), partial(read_depth, depth, *_unit(depth, options)), camera)
        for stem, image, depth, camera in zip(files.stems, files.image, files.depth, cameras, strict=True)
    )
    truth = partial(read_truth, files.folder, label, files.stems, options.truth)
    return Sample(category, files.folder.name, split, label, None, views, truth)


def _unit(file: RawFile, options: Sim3dOptions) -> tuple[str, str]:
    """The unit of a depth file, and the setting that says so."""
    key = "synthetic_unit" if file.suffix == ".exr" else "depth_unit"
    return getattr(options, key), f"sim3d.{key}"


def _check_class(root: Path, options: Sim3dOptions, category: str) -> dict[str, float]:
    """How far the views of the first tested instance and of the training instance lie apart, see ``overlap``, and how
    far the ground truth of the first anomalous instance lies off its surface.

    Raises:
        DataError: a setting contradicts the data; the message names the one that would not.
    """
    samples = _list_class(root, options, category)
    tested = [sample for sample in samples if sample.split == "test" and sample.name != f"{category}_real"]
    labels = {sample.label for sample in tested}
    if len(labels) < 2:
        said = (
            f"{root / category}: all {len(tested)} tested instances are {min(labels)}: sim3d.anomalous "
            f"{options.anomalous!r} marks the names of anomalous ones, such as {tested[0].name}"
        )
        if labels == {"anomalous"}:
            raise DataError(said)
        log.warning("%s", said)
    _, (real, *_) = _instances(root, options, category)
    rivals = list(_rivals(root, options, category, real))
    found = {}
    for sample in (tested[0], samples[0]):
        thinned = [_thin_view(sample, view) for view in sample.views]
        cameras = [view.camera for view in sample.views]
        place = str(root / category / sample.name)
        if len(sample.views) > 1:
            found[f"overlap_{sample.split}"] = named(place, check_overlap, thinned, cameras, rivals)
    anomalous = next((sample for sample in tested if sample.label == "anomalous"), None)
    truth = None if anomalous is None else anomalous.read_truth()
    if truth is not None and truth.kind != "masks":
        surface = [_thin_view(anomalous, view) for view in anomalous.views]
        points = truth.points if truth.voxels is None else truth.voxels.centers
        place = str(root / category / anomalous.name)
        cameras = [view.camera for view in anomalous.views]
        found["truth_off_surface"] = named(place, check_truth, points, surface, cameras, options.truth.unit)
    return found


def _thin_view(sample: Sample, view: View) -> Thinned:
    depth, image = view.read_depth(), view.read_image()
    if image.shape[:2] != depth.depth.shape:
        raise DataError(
            f"{sample.category}/{sample.name} view {view.name}: the image is {image.shape[0]}x{image.shape[1]}, its "
            f"depth {depth.depth.shape[0]}x{depth.depth.shape[1]}: they must lie on the same pixels"
        )
    return thin(depth)


def _rivals(root: Path, options: Sim3dOptions, category: str, real: Files) -> Iterator[tuple[str, list[Camera]]]:
    """The cameras of the views under every other convention, and under the other order of the views."""
    rivals = [
        (f"sim3d.{words}", replace(options, calibration=rival)) for words, rival in rival_settings(options.calibration)
    ]
    other = "lexicographic" if options.view_order == "natural" else "natural"
    rivals.append((f"sim3d.view_order {other}", replace(options, view_order=other)))
    for words, rival in rivals:
        try:
            files = _files(real.folder, rival)
            cameras = dict(zip(files.stems, _cameras(root, rival, category, files), strict=True))
        except DataError:
            continue  # under this setting the calibration is none, so it is no rival
        yield words, [cameras[stem] for stem in real.stems]
