"""Readers and writers of MVTec AD, MVTec LOCO, MVTec AD 2 and VisA: every known trap, in folders and in archives."""

import csv
import hashlib
import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import mvtec_ad, mvtec_ad2, mvtec_loco, visa
from data_prep.item import sample_keys
from data_prep.synthetic import SynthConfig, synth
from data_prep.tree import RawTree
from data_prep.visa import VisaOptions
from dino_depth.errors import ConfigError, DataError

READERS = {"mvtec_ad": mvtec_ad, "mvtec_loco": mvtec_loco, "mvtec_ad2": mvtec_ad2, "visa": visa}
NO_TABLE = VisaOptions(split_csv="none")


def items(name: str, root: Path, options: VisaOptions | None = None):
    arguments = [options or VisaOptions()] if name == "visa" else []
    return sorted(READERS[name].items(RawTree(root), *arguments), key=lambda item: item.source)


def touch(root: Path, *names: str):
    """Small images, each of another grey."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (sum(name.encode()) % 256,) * 3).save(path)


def table(root: Path, *rows: str, name: str = "1cls"):
    path = root / "split_csv" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["object,split,label,image,mask", *rows, ""]))


def make(root: Path, layout: str, **options) -> Path:
    options = {"size": 48, "categories": ["hex_nut", "t_slot_profile"], "test_per_category": 6, "workers": 1} | options
    synth(SynthConfig(layout, str(root), 2, **options))
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("trees")
    return {name: make(base / f"raw-{name}.v1", name) for name in READERS}


def places(found) -> Counter:
    return Counter((item.category, item.split, item.label) for item in found)


# Any of the four


def test_written_trees_are_read_back(trees):
    kinds = ["bent", "bump", "cut"]
    expected = {
        "mvtec_ad": {("train", "good"): 2, ("test", "good"): 3, **{("test", kind): 1 for kind in kinds}},
        "mvtec_loco": {
            ("train", "good"): 2, ("validation", "good"): 1, ("test", "good"): 3, ("test", "logical_anomalies"): 2,
            ("test", "structural_anomalies"): 1,
        },
        "mvtec_ad2": {
            ("train", "good"): 2, ("validation", "good"): 1, ("test_public", "good"): 6, ("test_public", "bad"): 6,
            ("test_private", "unknown"): 2, ("test_private_mixed", "unknown"): 2,
        },
        "visa": {("train", "good"): 2, ("test", "good"): 3, ("test", "anomalous"): 3},
    }  # fmt: skip
    for name, counts in expected.items():
        found = items(name, trees[name])
        wanted = {(category, *place): n for category in ("hex_nut", "t_slot_profile") for place, n in counts.items()}
        assert places(found) == wanted, name
        assert {item.dataset for item in found} == {name}
        assert len(set(sample_keys(found))) == len(found)


@pytest.mark.parametrize("name", READERS)
def test_every_image_is_read_as_its_own_pixels_and_no_mask_is_an_image(trees, name):
    for item in items(name, trees[name]):
        image = READERS[name].read_image(item)
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        with Image.open(trees[name] / item.source) as expected:
            assert np.array_equal(image, np.asarray(expected.convert("RGB")))
        # A photograph has many values, a mask few.
        assert len(np.unique(image)) > 20
        assert "mask" not in item.source.lower() and "ground_truth" not in item.source


@pytest.mark.parametrize("name", READERS)
def test_masks_named_by_items_exist_and_belong_to_anomalies_only(trees, name):
    found = items(name, trees[name])
    for item in found:
        anomalous = item.label not in ("good", "unknown")
        assert ("mask" in item.extra) == anomalous, item.source
        if anomalous:
            path = trees[name] / item.extra["mask"]
            masks = sorted(path.iterdir()) if path.is_dir() else [path]
            assert len(masks) == item.extra.get("masks", 1)
            assert all(np.asarray(Image.open(mask)).any() for mask in masks)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("tree", [*READERS, "mvtec3d"])
def test_a_siblings_tree_is_refused_with_one_line(trees, tmp_path, reader, tree):
    if reader == tree:
        return
    root = trees.get(tree) or tmp_path / "raw3d"
    if tree == "mvtec3d":
        touch(root, "bagel/train/good/rgb/000.png", "bagel/test/hole/gt/000.png", "bagel/validation/good/rgb/000.png")
    category = "bagel" if tree == "mvtec3d" else "hex_nut"
    for options in (VisaOptions(), NO_TABLE):
        for place in (root, root / category):
            with pytest.raises(DataError) as error:
                items(reader, place, options)
            assert "\n" not in str(error.value) and reader in str(error.value) and str(root) in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_root_may_be_one_category(trees, name):
    whole = [item for item in items(name, trees[name], NO_TABLE) if item.category == "hex_nut"]
    one = items(name, trees[name] / "hex_nut", NO_TABLE)

    def facts(item):
        return item.source, item.split, item.label, item.stem, item.group, item.extra, item.file.read()

    assert [facts(item) for item in one] == [facts(item) for item in whole] and one


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["archive", "folder of the archive", "wrapped", "zip", "wrapped folder"])
def test_archives_and_wrapping_folders_hold_the_same_items(trees, tmp_path, name, kind):
    raw = trees[name]
    expected = [(item.source, item.split, item.label, item.group, item.extra) for item in items(name, raw)]
    content = {item.source: item.file.read() for item in items(name, raw)}
    if kind == "wrapped folder":
        shutil.copytree(raw, tmp_path / "outer" / "in-ner.1")
        root = tmp_path / "outer"
    elif kind == "wrapped":
        shutil.copytree(raw, tmp_path / "raw" / "some_dataset")
        root = Path(shutil.make_archive(str(tmp_path / "download"), "gztar", tmp_path / "raw"))
    else:
        formats = {"visa": "tar", "mvtec_ad2": "gztar"}
        root = Path(
            shutil.make_archive(
                str(tmp_path / "d" / "x.y"), "zip" if kind == "zip" else formats.get(name, "xztar"), raw
            )
        )
        if kind == "folder of the archive":
            root = root.parent
    found = items(name, root)
    assert [(item.source, item.split, item.label, item.group, item.extra) for item in found] == expected
    in_order = sorted(found, key=lambda item: item.file.order)
    assert {item.source: item.file.read() for item in in_order} == content


@pytest.mark.parametrize("name", READERS)
def test_the_published_archives_are_written_and_read(trees, tmp_path, name):
    expected = {
        "mvtec_ad": "mvtec_anomaly_detection.tar.xz", "mvtec_loco": "mvtec_loco_anomaly_detection.tar.xz",
        "mvtec_ad2": "mvtec_ad_2.tar.gz", "visa": "VisA_20220922.tar",
    }[name]  # fmt: skip
    root = make(tmp_path / "packed", name, archive=True)
    assert sorted(path.name for path in root.iterdir()) == sorted(["SYNTHETIC.json", expected])
    assert places(items(name, root)) == places(items(name, trees[name]))


@pytest.mark.parametrize("name", READERS)
def test_a_written_image_does_not_depend_on_how_many_others_there_are(trees, tmp_path, name):
    def digests(root):
        files = (path for path in root.rglob("*") if path.is_file() and path.suffix not in (".csv", ".json"))
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    few = digests(make(tmp_path / "few", name, categories=["hex_nut"], test_per_category=4))
    assert few.items() <= digests(trees[name]).items()
    other = digests(make(tmp_path / "other", name, categories=["hex_nut"], test_per_category=4, seed=1))
    assert other.keys() == few.keys()
    assert all(other[name] != few[name] for name in few if "mask" not in name.lower() and "ground" not in name)


def test_published_counts_have_the_sums_that_are_known():
    def total(reader, split=None, label=None):
        rows = reader.PUBLISHED
        return sum(n for _, s, k, n in rows if split in (None, s) and label in (None, k))

    assert len({row[0] for row in mvtec_ad.PUBLISHED}) == 15
    parts = [total(mvtec_ad, "train"), total(mvtec_ad, "test", "good"), total(mvtec_ad, "test", "anomalous")]
    assert parts == [3629, 467, 1258] and total(mvtec_ad) == 5354

    loco = [(split, label) for split in ("train", "validation") for label in ("good",)]
    loco += [("test", label) for label in ("good", "logical_anomalies", "structural_anomalies")]
    assert [total(mvtec_loco, *place) for place in loco] == [1778, 305, 575, 561, 432] and total(mvtec_loco) == 3651

    splits = ("train", "validation", "test_public", "test_private", "test_private_mixed")
    assert [total(mvtec_ad2, split) for split in splits] == [2528, 302, 1084, 2045, 2045]
    assert total(mvtec_ad2) == 8004

    assert len({row[0] for row in visa.PUBLISHED}) == 12
    parts = [total(visa, "train"), total(visa, "test", "good"), total(visa, "test", "anomalous")]
    assert parts == [8659, 962, 1200] and total(visa) == 10821


def test_licences_are_those_of_the_datasets(trees):
    for name, reader in READERS.items():
        licence = reader.LICENCE
        assert ("CC BY 4.0" in licence) == (name == "visa") and ("CC BY-NC-SA" in licence) == (name != "visa")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_broken_images_are_refused(trees, tmp_path, name, content):
    source = items(name, trees[name])[0].source
    root = shutil.copytree(trees[name], tmp_path / "copy")
    whole = (root / source).read_bytes()
    (root / source).write_bytes(whole[: len(whole) // 2] if content is None else content)
    (item,) = [item for item in items(name, root) if item.source == source]
    with pytest.raises(DataError, match="empty|not a readable image"):
        READERS[name].read_image(item)


# MVTec AD


def test_mvtec_ad_grey_images_become_three_equal_channels(trees):
    modes = {}
    for item in items("mvtec_ad", trees["mvtec_ad"]):
        modes[item.category] = Image.open(trees["mvtec_ad"] / item.source).mode
        image = mvtec_ad.read_image(item)
        assert (image[..., :1] == image).all() == (item.category == "hex_nut")
    assert modes == {"hex_nut": "L", "t_slot_profile": "RGB"}


def test_mvtec_ad_pairs_masks_by_stem_and_label(tmp_path):
    touch(tmp_path, *(f"tile/test/{label}/{stem}.png" for label in ("oil", "crack") for stem in ("000", "001")))
    touch(tmp_path, "tile/ground_truth/crack/001_mask.png")
    masks = {item.source: item.extra.get("mask") for item in items("mvtec_ad", tmp_path)}
    assert masks.pop("tile/test/crack/001.png") == "tile/ground_truth/crack/001_mask.png"
    assert set(masks.values()) == {None} and len(masks) == 3


def test_mvtec_ad_names_with_dots_hyphens_and_capitals_stay_apart(tmp_path):
    touch(tmp_path, *(f"my-part.v2/train/good/{stem}.png" for stem in ("a.1", "a.2", "a-1", "a_1", "B", "b.c.d")))
    touch(tmp_path, "my-part.v2/test/good/E.PNG", "my-part.v2/test/good/.hidden.png", "preview.png")
    found = items("mvtec_ad", tmp_path)
    assert {item.category for item in found} == {"my-part.v2"}
    assert sorted(item.stem for item in found) == ["B", "E", "a-1", "a.1", "a.2", "a_1", "b.c.d"]
    assert len({key.split(".")[0] for key in sample_keys(found)}) == 7


def test_mvtec_ad_refuses_another_split(tmp_path):
    touch(tmp_path, "tile/train/good/000.png", "tile/val/good/000.png")
    with pytest.raises(DataError, match=r"tile/val is no split of mvtec_ad: expected train, test"):
        items("mvtec_ad", tmp_path)


# MVTec LOCO


def test_mvtec_loco_never_takes_masks_for_images(tmp_path):
    touch(tmp_path, "pushpins/train/good/000.png", "pushpins/validation/good/000.png")
    touch(tmp_path, *(f"pushpins/test/{label}/000.png" for label in ("good", "logical_anomalies")))
    touch(tmp_path, *(f"pushpins/ground_truth/logical_anomalies/000/{mask:03}.png" for mask in range(12)))
    found = items("mvtec_loco", tmp_path)
    assert len(found) == 4
    (masked,) = [item for item in found if item.extra]
    assert masked.label == "logical_anomalies"
    assert masked.extra == {"mask": "pushpins/ground_truth/logical_anomalies/000", "masks": 12}


def test_mvtec_loco_refuses_an_unknown_label(tmp_path):
    touch(tmp_path, "pushpins/train/good/000.png", "pushpins/test/bent/000.png")
    with pytest.raises(DataError, match=r"test/bent is no label of mvtec_loco in test: expected good, logical"):
        items("mvtec_loco", tmp_path)


def test_mvtec_loco_logical_anomalies_show_another_part_and_where_the_right_one_should_be(trees):
    for category in ("hex_nut", "t_slot_profile"):
        for folder in sorted((trees["mvtec_loco"] / category / "ground_truth" / "logical_anomalies").iterdir()):
            foreign, right = (np.asarray(Image.open(path)) > 0 for path in sorted(folder.iterdir()))
            assert foreign.any() and right.any() and (foreign != right).any()


# MVTec AD 2


def test_mvtec_ad2_groups_the_lights_of_a_scene(trees):
    found = items("mvtec_ad2", trees["mvtec_ad2"])
    lights = {}
    for item in found:
        assert item.stem.endswith(f"_{item.extra['light']}")
        lights.setdefault(item.group, []).append(item.extra["light"])
    every = ["overexposed", "regular", "shift_1", "shift_2", "shift_3", "underexposed"]
    assert all(sorted(names) == every for group, names in lights.items() if "/test_public/" in group)
    assert sum("/test_public/" in group for group in lights) == 4
    assert all(names == ["mixed"] for group, names in lights.items() if "/test_private_mixed/" in group)
    # Numbers begin anew in each folder: 000 of one is another scene than 000 of the other.
    assert {"hex_nut/test_public/good/000", "hex_nut/test_public/bad/000", "hex_nut/train/good/000"} <= lights.keys()


def test_mvtec_ad2_reads_flat_private_splits_and_no_ground_truth(tmp_path):
    touch(tmp_path, "can/train/good/000_regular.png", "can/test_private/000_regular.png")
    touch(tmp_path, "can/test_private_mixed/000_mixed.png", "can/test_public/bad/003_shift_2.png")
    touch(tmp_path, "can/test_public/ground_truth/bad/003_shift_2_mask.png", "can/test_public/ground_truth/stray.png")
    found = {item.source: item for item in items("mvtec_ad2", tmp_path)}
    assert len(found) == 4
    private = found["can/test_private/000_regular.png"]
    assert (private.category, private.split, private.label) == ("can", "test_private", "unknown")
    bad = found["can/test_public/bad/003_shift_2.png"]
    assert bad.extra == {"mask": "can/test_public/ground_truth/bad/003_shift_2_mask.png", "light": "shift_2"}
    assert bad.group == "can/test_public/bad/003"


def test_mvtec_ad2_an_image_without_number_and_light_is_a_scene_of_its_own(tmp_path):
    touch(tmp_path, "can/test_private/000.png", "can/test_private/frame_001.png", "can/test_private/002_new.png")
    found = items("mvtec_ad2", tmp_path)
    assert [(item.group, item.extra.get("light")) for item in found] == [
        (None, None), ("can/test_private/002", "new"), (None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["can/train/000_regular.png", "can/test_private/good/000_regular.png", "can/test_public/dent/000_x.png"]
)
def test_mvtec_ad2_refuses_an_image_in_the_wrong_place(tmp_path, name):
    touch(tmp_path, "can/train/good/000_regular.png", name)
    with pytest.raises(DataError, match=f"{name} is no image of mvtec_ad2: expected"):
        items("mvtec_ad2", tmp_path)


def test_mvtec_ad2_lights_change_colours_and_not_the_scene(trees):
    folder = trees["mvtec_ad2"] / "hex_nut" / "test_public"
    names = ("regular", "overexposed", "underexposed", "shift_1", "shift_2", "shift_3")
    images = {name: np.asarray(Image.open(folder / "bad" / f"000_{name}.png")).astype(float) for name in names}
    means = {name: image.mean() for name, image in images.items()}
    assert means["overexposed"] > 1.3 * means["regular"] > 2 * means["underexposed"]
    assert (images["overexposed"] == 255).mean() > (images["regular"] == 255).mean()
    for name in ("shift_1", "shift_2", "shift_3"):
        assert np.abs(images[name] - images["regular"]).mean() > 5
    masks = {(folder / "ground_truth" / "bad" / f"000_{name}_mask.png").read_bytes() for name in names}
    assert len(masks) == 1


# VisA


def tree_of_visa(root: Path, images: int = 3) -> Path:
    normal = [f"pcb1/Data/Images/Normal/{index:04}.JPG" for index in range(images)]
    touch(root, *normal, "pcb1/Data/Images/Anomaly/0000.JPG", "pcb1/Data/Masks/Anomaly/0000.png")
    rows = [f"pcb1,{'test' if index == 0 else 'train'},normal,{name}," for index, name in enumerate(normal)]
    table(
        root, *rows, "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/0000.JPG,pcb1/Data/Masks/Anomaly/0000.png"
    )  # fmt: skip
    return root


def test_visa_upper_case_images_get_split_label_and_mask_from_the_table(tmp_path):
    found = items("visa", tree_of_visa(tmp_path))
    assert [(item.split, item.label, item.stem, item.extra) for item in found] == [
        ("test", "anomalous", "0000", {"mask": "pcb1/Data/Masks/Anomaly/0000.png"}),
        ("test", "good", "0000", {}),
        ("train", "good", "0001", {}),
        ("train", "good", "0002", {}),
    ]
    assert all(item.file.name.endswith(".JPG") for item in found)


def test_visa_follows_the_chosen_table(trees):
    splits = {}
    for name in ("1cls", "2cls_highshot", "2cls_fewshot", "none"):
        found = items("visa", trees["visa"], VisaOptions(split_csv=name))
        assert len(found) == 16
        splits[name] = Counter((item.split, item.label) for item in found)
    assert splits["1cls"] == {("train", "good"): 4, ("test", "good"): 6, ("test", "anomalous"): 6}
    assert splits["none"] == {("all", "good"): 10, ("all", "anomalous"): 6}
    assert splits["2cls_highshot"][("train", "anomalous")] > splits["2cls_fewshot"][("train", "anomalous")] > 0


def arranged(root: Path, out: Path, table: str) -> Path:
    """What the dataset's own script makes of a tree and one of its tables."""
    rows = list(csv.DictReader((root / "split_csv" / f"{table}.csv").read_text().splitlines()))
    for row in rows:
        label = {"normal": "good", "anomaly": "bad"}[row["label"]]
        category, split = out / table / row["object"], row["split"]
        image = category / split / label / row["image"].rpartition("/")[2]
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / row["image"], image)
        if label == "bad":
            parts = ("ground_truth", "bad") if table == "1cls" else ("ground_truth", split, "bad")
            mask = category.joinpath(*parts, row["mask"].rpartition("/")[2])
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.array(Image.open(root / row["mask"])) > 0).astype(np.uint8) * 255).save(mask)
    return out


@pytest.mark.parametrize("table", ["1cls", "2cls_highshot", "2cls_fewshot"])
@pytest.mark.parametrize("inside", ["", "{table}"])
def test_visa_as_its_own_script_arranges_it(trees, tmp_path, table, inside):
    out = arranged(trees["visa"], tmp_path / "VisA_pytorch", table)
    found = items("visa", out / inside.format(table=table), VisaOptions(split_csv=table))
    raw = [item for item in items("visa", trees["visa"], VisaOptions(split_csv=table)) if item.split != "unlisted"]

    def told(items):
        return sorted((item.category, item.split, item.label, item.stem, "mask" in item.extra) for item in items)

    assert told(found) == told(raw) and sample_keys(found) and {item.label for item in found} == {"good", "anomalous"}
    by_place = {(item.category, item.split, item.label, item.stem): item for item in raw}
    for item in found:
        twin = by_place[item.category, item.split, item.label, item.stem]
        assert np.array_equal(visa.read_image(item), visa.read_image(twin))
        if "mask" in item.extra:
            assert (out / table / item.extra["mask"]).is_file()


def test_visa_arranged_by_another_table_is_refused(trees, tmp_path):
    out = arranged(trees["visa"], tmp_path / "VisA_pytorch", "2cls_fewshot")
    with pytest.raises(DataError, match="is arranged by 2cls_fewshot: visa.split_csv 1cls is another"):
        items("visa", out)
    arranged(trees["visa"], out, "1cls")
    assert all("bad" not in item.source or item.split == "test" for item in items("visa", out))
    one = items("visa", out / "1cls" / items("visa", out)[0].category, VisaOptions(split_csv="none"))
    assert {item.split for item in one} == {"all"}


def test_visa_one_category_needs_no_table_only_without_splits(tmp_path):
    root = tree_of_visa(tmp_path / "VisA") / "pcb1"
    with pytest.raises(DataError, match="holds 0 tables split_csv/1cls.csv: give the folder of the whole dataset, or"):
        items("visa", root)
    found = items("visa", root, NO_TABLE)
    assert [item.extra.get("mask") for item in found] == ["pcb1/Data/Masks/Anomaly/0000.png", None, None, None]


def test_visa_a_listed_image_that_is_missing_is_one_line(tmp_path):
    root = tree_of_visa(tmp_path)
    (root / "pcb1/Data/Images/Normal/0001.JPG").unlink()
    with pytest.raises(DataError, match=r"1cls.csv lists pcb1/Data/Images/Normal/0001.JPG, which is missing$"):
        items("visa", root)
    (root / "pcb1/Data/Images/Anomaly/0000.JPG").unlink()
    with pytest.raises(DataError, match=r"which is missing \(as are 1 more\)$"):
        items("visa", root)


def test_visa_an_image_that_is_not_listed_is_counted_as_unlisted(tmp_path):
    root = tree_of_visa(tmp_path)
    touch(root, "pcb1/Data/Images/Anomaly/0007.JPG", "pcb1/Data/Masks/Anomaly/0007.png")
    (item,) = [item for item in items("visa", root) if item.split == "unlisted"]
    assert (item.label, item.extra) == ("anomalous", {"mask": "pcb1/Data/Masks/Anomaly/0007.png"})


def test_visa_absent_categories_are_no_fault(tmp_path):
    root = tree_of_visa(tmp_path)
    text = (root / "split_csv/1cls.csv").read_text()
    (root / "split_csv/1cls.csv").write_text(text + "candle,train,normal,candle/Data/Images/Normal/0000.JPG,\n")
    assert len(items("visa", root)) == 4


def test_visa_the_mask_is_the_one_that_the_table_names(tmp_path):
    root = tree_of_visa(tmp_path)
    touch(root, "pcb1/Data/Masks/Anomaly/other.png")
    path = root / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace("Masks/Anomaly/0000", "Masks/Anomaly/other"))
    assert items("visa", root)[0].extra == {"mask": "pcb1/Data/Masks/Anomaly/other.png"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "1cls.csv is no table of splits: the file is empty"),
        (b"object,split,label,image,mask\n", "it has no rows"),
        (b"object,split,label,image\npcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG\n", "row 2 lacks one of"),
        (b"object,split,label,image,mask\npcb1,train,normal\n", "row 2 lacks one of object, split, label, image"),
        (b"object,split,label,image,mask\npcb1,val,normal,pcb1/Data/Images/Normal/0000.JPG,\n", "split 'val'"),
        (b"object,split,label,image,mask\npcb1,train,good,pcb1/Data/Images/Normal/0000.JPG,\n", "label 'good'"),
        (b"object,split,label,image,mask\n" + 2 * b"p,train,normal,pcb1/Data/a.JPG,\n", "row 3 lists pcb1/Data/a.JPG"),
        (b"\xff\xfe\x00", "is no table of splits: 'utf-8' codec"),
        (b'object,split,label,image,mask\n"pcb1,train', "is no table of splits: unexpected end of data"),
        (b"object,split,label,image,mask\npcb1,train,normal,pcb1\\Data\\0.JPG,\n", "lists none of the images"),
        (
            b"object,split,label,image,mask\npcb1,train,anomaly,pcb1/Data/Images/Normal/0000.JPG,\n",
            "calls pcb1/Data/Images/Normal/0000.JPG anomalous, its folder says good",
        ),
    ],
)
def test_visa_refuses_a_table_that_is_none_or_contradicts_the_folders(tmp_path, content, reason):
    root = tree_of_visa(tmp_path)
    (root / "split_csv" / "1cls.csv").write_bytes(content)
    with pytest.raises(DataError) as error:
        items("visa", root)
    assert reason in str(error.value) and "1cls.csv" in str(error.value) and "\n" not in str(error.value)


def test_visa_reads_tables_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    root = tree_of_visa(tmp_path)
    path = root / "split_csv" / "1cls.csv"
    expected = [(item.source, item.split) for item in items("visa", root)]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert [(item.source, item.split) for item in items("visa", root)] == expected


@pytest.mark.parametrize("name", ["../1cls", "1cls.csv", "", "a b"])
def test_visa_refuses_a_table_name_that_is_a_path(tmp_path, name):
    with pytest.raises(ConfigError, match="visa.split_csv must be the name of a table"):
        items("visa", tree_of_visa(tmp_path), VisaOptions(split_csv=name))


def test_visa_refuses_a_folder_that_is_no_label(tmp_path):
    touch(tree_of_visa(tmp_path), "pcb1/Data/Images/Broken/0000.JPG")
    with pytest.raises(DataError, match="Images/Broken is no label of visa: expected Normal, Anomaly"):
        items("visa", tmp_path)


def test_visa_writes_jpegs_kinds_of_defects_and_annotations(trees):
    root = trees["visa"]
    kinds = {}
    for line in (root / "hex_nut" / "image_anno.csv").read_text().splitlines()[1:]:
        image, kind, mask = line.split(",")
        assert Image.open(io.BytesIO((root / image).read_bytes())).format == "JPEG" and image.endswith(".JPG")
        assert (kind == "normal") == (mask == "") == ("/Normal/" in image)
        if mask:
            (kinds[kind],) = set(np.unique(np.asarray(Image.open(root / mask)))) - {0}
    assert kinds == {"bent": 1, "bump": 2, "cut": 3}
