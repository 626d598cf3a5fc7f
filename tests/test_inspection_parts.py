"""One's own parts: the folder form, its check, and converters, against scenes whose answer is known."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from anomaly_run import make_sample
from PIL import Image

from dino_depth.cli import main
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError
from dino_depth.inspection.check import PartsConfig, check
from dino_depth.inspection.convert import ConvertConfig, convert, write_instance
from dino_depth.inspection.parts import read_parts
from dino_depth.inspection.rig import RIG, Rig, rig_json


def write(root, count=2, views=4, change=lambda rig: rig):
    for seed in range(count):
        sample = make_sample(f"{seed:02d}", views, False, seed)
        names = [f"view_{place:02d}" for place in range(1, views + 1)]
        images, depths = ([getattr(view, f"read_{kind}")() for view in sample.views] for kind in ("image", "depth"))
        write_instance(root / sample.name, images, depths, names, None)
    rig = rig_json(Rig(dict(zip(names, [view.camera for view in sample.views], strict=True))))
    (root / RIG).write_text(json.dumps(change(rig)))
    return sample


def test_what_was_written_is_read_and_checked(tmp_path):
    written = write(tmp_path)
    rig, samples = read_parts(tmp_path)
    assert [sample.name for sample in samples] == ["00", "01"] and len(rig.cameras) == 4
    for one, two in zip(written.views, samples[1].views, strict=True):
        assert np.array_equal(one.read_image(), two.read_image())
        before, after = one.read_depth(), two.read_depth()
        assert np.array_equal(before.valid, after.valid)
        assert np.abs(before.depth - after.depth)[before.valid].max() < 1e-6
        assert np.allclose(one.camera.camera_to_world, two.camera.camera_to_world, atol=1e-12)
    for part in check(PartsConfig(str(tmp_path))):
        assert part.overlap < 0.1 and 0.4 < part.distance < 0.8 and max(part.extent) < 0.3
    assert main(["check", str(tmp_path)]) == 0


def test_a_wrong_convention_is_named(tmp_path):
    def inverted(rig):
        for row in rig["cameras"]:
            row["camera_to_world"] = np.linalg.inv(row["camera_to_world"]).tolist()
        return rig

    write(tmp_path, 1, change=inverted)
    with pytest.raises(DataError, match="calibration.direction world_to_camera") as error:
        check(PartsConfig(str(tmp_path)))
    assert "\n" not in str(error.value)


BAD = {
    "a missing view": (lambda root: shutil.rmtree(root / "00/view_02"),
                       "view view_02 is missing"),
    "another size": (lambda root: Image.new("L", (40, 30)).save(root / "00/view_01/image.png"), "30x40 pixels"),
    "depth x 1000": (lambda root: [tifffile.imwrite(p, 1000 * tifffile.imread(p)) for p in root.glob("*/*/depth.tiff")],
                     "depth.unit auto does not fit"),
    "no depth": (lambda root: (root / "00/view_01/depth.tiff").unlink(), "depth"),
    "a broken rig": (lambda root: (root / RIG).write_text("{"), "rig.json: cannot be read"),
    "an unknown key": (lambda root: (root / RIG).write_text('{"format": 1, "camera": []}'), "unknown key 'camera'"),
    "another format": (lambda root: (root / RIG).write_text('{"format": 9}'), "format is 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, case, capsys):
    write(tmp_path)
    spoil, words = BAD[case]
    spoil(tmp_path)
    assert main(["check", str(tmp_path)]) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dino-depth:")]
    assert len(said) == 1 and words in said[0]


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no instance in it"):
        check(PartsConfig(str(tmp_path)))


def test_a_scene_of_bop(tmp_path):
    sample, scene = make_sample("00", 3, False), tmp_path / "bop" / "000001"
    cameras = {}
    for folder in ("rgb", "depth"):
        (scene / folder).mkdir(parents=True)
    for number, view in enumerate(sample.views):
        depth, to_camera = view.read_depth(), np.linalg.inv(view.camera.camera_to_world)
        Image.fromarray(view.read_image()).save(scene / "rgb" / f"{number:06d}.png")
        codes = np.where(depth.valid, np.rint(depth.depth * 10000), 0).astype(np.uint16)
        Image.fromarray(codes).save(scene / "depth" / f"{number:06d}.png")
        cameras[str(number)] = {
            "cam_K": view.camera.matrix.ravel().tolist(), "depth_scale": 0.1,
            "cam_R_w2c": to_camera[:3, :3].ravel().tolist(), "cam_t_w2c": (1000 * to_camera[:3, 3]).tolist(),
        }  # fmt: skip
    (scene / "scene_camera.json").write_text(json.dumps(cameras))
    convert(ConvertConfig("bop", str(tmp_path / "bop"), str(tmp_path / "parts")))
    _, (read,) = read_parts(tmp_path / "parts")
    for one, two in zip(sample.views, read.views, strict=True):
        valid = one.read_depth().valid
        assert np.abs(one.read_depth().depth - two.read_depth().depth)[valid].max() < 1e-4
        assert np.allclose(one.camera.camera_to_world, two.camera.camera_to_world, atol=1e-9)
    check(PartsConfig(str(tmp_path / "parts")))


def test_clouds_of_x_y_z(tmp_path):
    points = np.random.default_rng(0).uniform(0.5, 0.7, (20, 30, 3)).astype(np.float32)
    points[:3] = 0
    (tmp_path / "raw").mkdir()
    tifffile.imwrite(tmp_path / "raw" / "a.tiff", points, photometric="rgb")
    convert(ConvertConfig("clouds", str(tmp_path / "raw"), str(tmp_path / "parts")))
    _, (read,) = read_parts(tmp_path / "parts")
    depth = read.views[0].read_depth()
    assert isinstance(depth, DepthMap) and not depth.valid[:3].any()
    assert np.array_equal(depth.depth[3:].astype(np.float32), points[3:, :, 2])
