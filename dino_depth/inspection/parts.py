"""One's own parts: a folder for each instance, in it a folder for each view.

    PARTS/rig.json                                   see rig.py; may lie in INSTANCE instead
    PARTS/INSTANCE/view_01/image.png, depth.tiff     image: png or jpg; depth: any format of `prep folder`

Views are in the order of their names. A folder that holds views itself is a single instance. All that is read here is
listed first, so that a missing view is known before anything is computed.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import folder as depth_files
from data_prep.archives import RawFile, hidden
from data_prep.formats import decode_image
from data_prep.item import Item
from data_prep.tree import RawTree, refuse_link_out, refuse_links_out
from dino_depth.anomaly.dataset import Sample, View, named
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.inspection.rig import RIG, Rig, difference, find_rig, read_rig

__all__ = ["instance_folders", "is_parts", "read_instance", "read_parts"]

CATEGORY = "part"
PREFIX = "view_"
IMAGES = ("image.png", "image.jpg", "image.jpeg")


def is_parts(root: str | Path) -> bool:
    """Whether a folder has the form above."""
    return Path(root).is_dir() and ((Path(root) / RIG).is_file() or bool(_listed(Path(root))))


def instance_folders(root: str | Path) -> list[Path]:
    """The folders of the instances below ``root``, by name, or ``root`` itself where it holds views.

    Raises:
        DataError: there is none, or one is a link out of ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    found = _listed(root)
    for folder in found if found != [root] else []:
        refuse_link_out(folder, root.resolve())
    if not found:
        raise DataError(f"{root}: no instance in it: expected INSTANCE/{PREFIX}01/image.png and depth.*")
    return found


def _listed(root: Path) -> list[Path]:
    if _views(root):
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and not hidden(path.name) and _views(path))


def _views(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith(PREFIX))


def read_parts(root: str | Path, rig: Rig | None = None) -> tuple[Rig, list[Sample]]:
    """Every instance of a folder, and the rig they share.

    Args:
        rig: that instances must be of, such as a model's; None: that of the first instance.

    Raises:
        DataError: there is no instance, a file is missing or twice, a link leads out of an instance, or one is of
            another rig.
    """
    samples = []
    for place in instance_folders(root):
        sample, rig = read_instance(place, rig)
        samples.append(sample)
    views = {tuple(view.name for view in sample.views): sample.name for sample in samples}
    if len(views) > 1:
        (one, first), (two, second) = list(views.items())[:2]
        raise DataError(f"{root}: {first} has the views {', '.join(one)}, {second} has {', '.join(two)}")
    return rig, samples


def read_instance(folder: str | Path, rig: Rig | None = None) -> tuple[Sample, Rig]:
    """One instance; reads file names only. Arguments and errors as ``read_parts``."""
    folder = Path(folder)
    refuse_links_out(folder)
    path = find_rig(folder)
    if path is not None:
        found = read_rig(path)
        if rig is not None and (told := difference(rig, found)):
            raise DataError(f"{path}: another rig than before: {told}")
        rig = rig or found
    rig = rig or Rig()
    views = _views(folder)
    if not views:
        raise DataError(f"{folder}: no folder {PREFIX}* in it")
    names = [view.name for view in views]
    if rig.cameras:
        if missing := [name for name in rig.cameras if name not in names]:
            raise DataError(f"{folder}: view {missing[0]} is missing ({len(rig.cameras)} are in the rig)")
        if extra := [name for name in names if name not in rig.cameras]:
            raise DataError(f"{folder}: the rig has no camera {extra[0]}")
    elif len(views) > 1:
        raise DataError(f"{folder}: {len(views)} views need their cameras: no {RIG} in it or above it names any")
    made = tuple(_view(place, rig) for place in views)
    return Sample(CATEGORY, folder.resolve().name, "test", "unknown", None, made, lambda: None), rig


def _view(folder: Path, rig: Rig) -> View:
    images = [name for name in IMAGES if (folder / name).is_file()]
    if len(images) != 1:
        raise DataError(f"{folder}: expected one of {', '.join(IMAGES)}, found {', '.join(images) or 'none'}")
    try:
        items = depth_files.items(RawTree(str(folder)), replace(rig.depth, glob="depth.*", split="scan"))
    except (ConfigError, DataError) as error:
        raise DataError(f"{folder}: depth.*: {error}") from error
    if len(items) != 1:
        raise DataError(f"{folder}: {len(items)} files depth.*, one is expected")
    image, camera = RawFile(str(folder), images[0]), rig.cameras.get(folder.name)
    place = None if camera is None else (camera.height, camera.width)
    return View(folder.name, partial(_image, image, place), partial(_depth, items[0], place), camera)


def _image(file: RawFile, expected: tuple[int, int] | None) -> np.ndarray:
    image = named(str(file), decode_image, file.read())
    if np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2]):
        image = image[..., 0]  # grey files come as three equal channels
    _same_size(file, image.shape[:2], expected)
    return image


def _depth(item: Item, expected: tuple[int, int] | None) -> DepthMap:
    depth = named(str(item.file), depth_files.read, item)
    _same_size(item.file, depth.depth.shape, expected)
    return depth


def _same_size(file: RawFile, found: Sequence[int], expected: tuple[int, int] | None):
    if expected is not None and tuple(found) != expected:
        raise DataError(f"{file}: {found[0]}x{found[1]} pixels, its camera has {expected[0]}x{expected[1]}")
