"""Genuine sensor files pass through the readers, the writer and the checker."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import webdataset
from PIL import Image

from data_prep import folder, mvtec3d
from data_prep.check import CheckConfig, check
from data_prep.folder import FolderOptions
from data_prep.shards import PrepareConfig, prepare
from data_prep.tree import RawTree
from dino_depth.depth import decode_png

REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"
SHIPPED = Path(__file__).parent / "sensor"


def need(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"shared/realdata/{name} is not beside this checkout")
    return REAL / name


def depth_maps(out: Path):
    """Every stored map by the source it came from."""
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        description = json.loads(sample["json"])
        depth_map = decode_png(sample["depth.png"], description["near"], description["far"], description["kind"])
        yield description, depth_map


@pytest.mark.parametrize("inside", ["", "cable_gland"])
def test_mvtec3d_cable_gland(tmp_path, inside):
    root = need("mvtec3d_cable_gland")
    manifest = prepare(PrepareConfig("mvtec3d", str(root / inside), str(tmp_path / "o"), workers=1))
    check(CheckConfig(str(tmp_path / "o")))
    counts = manifest["counts"]["mvtec3d"]["cable_gland"]
    assert (counts["train"]["good"], counts["validation"]["good"]) == (2, 1)
    assert manifest["sources"]["mvtec3d"]["preprocessed"] is False and manifest["sources"]["mvtec3d"]["dropped"] == []
    for description, depth_map in depth_maps(tmp_path / "o"):
        points = tifffile.imread(root / description["source"])
        assert np.array_equal(depth_map.valid, (points != 0).any(-1))
        valid = depth_map.valid
        assert np.abs(depth_map.depth - points[..., 2])[valid].max() < 1e-6
        assert 0.61 < depth_map.depth[valid].min() < depth_map.depth.max() < 0.70
        assert description["class_id"] == 0 and description["label"] == "good"


def test_mvtec3d_zeroed_plane_is_recognised(tmp_path):
    """The usual preprocessing, redone on a genuine cloud: the plane of the border is zeroed, the rest padded."""
    points = tifffile.imread(need("mvtec3d_cable_gland") / "cable_gland/train/good/xyz/000.tiff")
    valid = (points != 0).any(-1)
    border = valid.copy()
    border[10:-10, 10:-10] = False
    centre = points[border].mean(0)
    normal = np.linalg.svd(points[border] - centre, full_matrices=False)[2][2]
    distance = np.abs((points - centre) @ normal)
    removed = np.where((valid & (distance > 0.005))[..., None], points, 0).astype(np.float32)
    path = tmp_path / "cable_gland/train/good/xyz/000.tiff"
    path.parent.mkdir(parents=True)
    tifffile.imwrite(path, removed, photometric="rgb")
    assert 0.02 < (removed != 0).any(-1).mean() < valid.mean() / 2
    assert mvtec3d.describe(mvtec3d.items(RawTree(tmp_path)))["preprocessed"] is True


def test_7scenes(tmp_path):
    root = need("tsdf_7scenes_16")
    options = FolderOptions(name="7scenes", unit="mm", missing=[65535], category="kitchen")
    manifest = prepare(PrepareConfig("folder", str(root), str(tmp_path / "o"), 2, 6, folder=options))
    check(CheckConfig(str(tmp_path / "o")))
    assert manifest["counts"] == {"7scenes": {"kitchen": {"train": {"unknown": 16}}}}
    for description, depth_map in depth_maps(tmp_path / "o"):
        stored = np.array(Image.open(root / description["source"])).astype(np.float64)
        assert np.array_equal(depth_map.valid, stored > 0)
        # Half a code of this range is far below the sensor's millimetre.
        assert np.abs(depth_map.depth * 1000 - stored)[depth_map.valid].max() < 0.05
        assert np.array_equal(np.rint(depth_map.depth * 1000), stored)


def test_redwood_beside_its_colour_images(tmp_path):
    root = need("open3d_rgbd_redwood5") / "RGBD"
    out = str(tmp_path / "o")
    manifest = prepare(PrepareConfig("folder", str(root), out, 1, folder=FolderOptions(glob="depth/*")))
    check(CheckConfig(out))
    assert manifest["total"] == 5
    for _, depth_map in depth_maps(tmp_path / "o"):
        assert 0.5 < np.median(depth_map.depth[depth_map.valid]) < 4


@pytest.mark.parametrize(
    ("options", "lowest", "highest"),
    [
        ({"glob": "TUM_depth.png", "scale": 1 / 5000}, 1.4, 9.5),
        ({"glob": "SUN_depth.png", "encoding": "sun_rgbd"}, 1.0, 10.0),
        ({"glob": "NYU_depth.pgm", "encoding": "nyu_raw"}, 1.3, 10.0),
    ],
)
def test_known_raw_codes(options, lowest, highest):
    """The right decoding gives a room: metres in range, and neighbours that differ by centimetres at most."""
    root = need("open3d_rgbd_redwood5") / "RGBD" / "other_formats"
    (item,) = folder.items(RawTree(root), FolderOptions(**options))
    depth_map = folder.read(item)
    depth, valid = depth_map.depth, depth_map.valid
    assert lowest < depth[valid].min() and depth.max() < highest and valid.mean() > 0.7
    steps = np.abs(np.diff(depth, axis=1))[valid[:, 1:] & valid[:, :-1]]
    assert np.median(steps) < 0.02 and np.percentile(steps, 90) < 0.05


@pytest.fixture(params=["shipped", "shared"])
def clouds(request) -> Path:
    """Organised clouds of a Kinect: two that lie here, thinned, and whole ones where they are at hand."""
    return SHIPPED if request.param == "shipped" else need("pcl_kinect_mosd")


def test_kinect_clouds(clouds, tmp_path):
    manifest = prepare(PrepareConfig("folder", str(clouds), str(tmp_path / "o"), 1))
    check(CheckConfig(str(tmp_path / "o")))
    assert manifest["total"] == len(list(clouds.glob("*.pcd"))) > 0
    for description, depth_map in depth_maps(tmp_path / "o"):
        assert depth_map.depth.shape == ((60, 80) if clouds == SHIPPED else (480, 640))
        # 37-44 % of the points of these clouds are NaN.
        assert 0.5 < description["valid_fraction"] < 0.7
        stored = folder.decode_pcd((clouds / description["source"]).read_bytes())
        assert np.array_equal(depth_map.valid, np.isfinite(stored))
        # What a 16-bit code of this range leaves of it, far below the sensor's millimetre.
        assert np.abs(depth_map.depth - stored)[depth_map.valid].max() < 2e-5
        assert 0.4 < depth_map.depth[depth_map.valid].min() < depth_map.depth.max() < 3


def test_kinect_coordinates_agree_with_the_camera(clouds):
    """x = (column - 319.5) z / 525 holds to the last digits only if every field is cut out where it lies."""
    content = sorted(clouds.glob("*.pcd"))[0].read_bytes()
    x, y, z = (folder.decode_pcd(content, axis) for axis in range(3))
    valid = np.isfinite(z)
    rows, columns = np.mgrid[3:480:8, 3:640:8] if clouds == SHIPPED else np.mgrid[:480, :640]
    assert np.allclose(x[valid], ((columns - 319.5) * z / 525)[valid], atol=1e-4)
    assert np.allclose(y[valid], ((rows - 239.5) * z / 525)[valid], atol=1e-4)
