"""The page about shards: every number from manifest and samples, every picture from its map, nothing from outside."""

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from importlib import import_module

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_report import Checker

from data_prep import inspect as inspect_module
from data_prep import mvtec3d, mvtec_ad, visa
from data_prep.check import CheckConfig, check
from data_prep.folder import FolderOptions
from data_prep.inspect import THUMBNAIL, InspectConfig, inspect
from data_prep.manifest import count, digest_file, digest_json
from data_prep.shards import PrepareConfig, prepare
from data_prep.shrink import shrink
from data_prep.summary import PAPER, Histogram, count_table, drop_groups, histogram, paper_table
from dino_depth.depth import UNIT, DepthMap, Normalization, decode_png, encode_png, normalize
from dino_depth.errors import ConfigError, DataError
from dino_depth.licences import non_commercial
from dino_depth.picture import MISSING, VIRIDIS, colour, data_uri

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REAL = {"reader": "mvtec3d", "licence": "MVTec 3D-AD, CC BY-NC-SA 4.0 (non-commercial)", "synthetic": False}
REAL |= {"preprocessed": True, "preprocessed_reason": "rope: 0.0% of the border is valid, the plane was removed"}
DROPPED = [{"path": f"rope/{n}.tiff", "reason": f"median depth is {n}.5e-3 m", "flat": False} for n in range(5)]
DROPPED += [{"path": "rope/9.tiff", "reason": "no image", "flat": False}]
FLAT = [{"path": "tile/<1>.png", "reason": "flat: disparity 1..1", "flat": True}]
RENDERED = {"reader": "eyecandies", "licence": "Apache-2.0", "synthetic": True}
ESTIMATED = {"reader": "visa", "licence": "VisA, CC BY 4.0", "synthetic": False}
ESTIMATED |= {"pseudo_depth": {"model": "owner/model", "revision": "abc123", "licence": "CC-BY-NC-4.0"}}


def depth_map(seed: int, height: int = 20, width: int = 30, kind: str = "metric") -> DepthMap:
    random = np.random.default_rng(seed)
    values = 0.5 + 0.1 * random.random((height, width)) + 0.01 * seed
    return DepthMap(values, random.random((height, width)) < 0.8, kind)


def sample(dataset: str, category: str, split: str, label: str, seed: int, **more) -> tuple[str, bytes, dict]:
    """Key, PNG and description of a sample as ``prep`` writes it."""
    shape = {key: more.pop(key) for key in ("height", "width", "kind") if key in more}
    made = depth_map(seed, **shape)
    png, near, far = encode_png(made)
    meta = {
        "near": near, "far": far, "unit": UNIT[made.kind], "kind": made.kind, "source": f"{seed}", "group": None,
        "dataset": dataset, "category": category, "split": split, "label": label, "height": made.depth.shape[0],
        "width": made.depth.shape[1], "valid_fraction": float(made.valid.mean()), **more,
    }  # fmt: skip
    return f"{dataset}/{re.sub('[^a-z]', '_', category)}/{split}-{label}-{seed:03}", png, meta


def write(folder, samples: list, sources: dict[str, dict], per_shard: int = 7) -> dict:
    """A finished shard folder of these samples; its manifest."""
    folder.mkdir(parents=True)
    shards = []
    for start in range(0, len(samples), per_shard):
        path = folder / f"depth-{len(shards):06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, png, meta in samples[start : start + per_shard]:
                for suffix, content in (("depth.png", png), ("json", json.dumps(meta).encode())):
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        number = len(samples[start : start + per_shard])
        row = {"file": path.name, "sha256": digest_file(path), "bytes": path.stat().st_size, "samples": number}
        shards.append(row)
    places = [tuple(meta[key] for key in ("dataset", "category", "split", "label")) for _, _, meta in samples]
    maps = Counter(place[0] for place in places)
    for name, source in sources.items():
        dropped = source.get("dropped", [])
        listed = {"count": maps[name] + len(dropped), "sha256": "0" * 64}
        sources[name] = {**source, "files_listed": listed, "maps": maps[name], "scenes": maps[name], "dropped": dropped}
    config = {"samples_per_shard": per_shard}
    manifest = {
        "format": "dino-depth shards", "version": 2, "sources": sources, "config": config,
        "config_hash": digest_json(config), "versions": {"numpy": "9.8.7"}, "total": len(samples),
        "counts": count(places), "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def samples() -> list:
    """Three datasets: real, rendered, estimated."""
    made = [sample("mvtec3d", "rope", "train", "good", seed) for seed in range(12)]
    made += [
        sample("mvtec3d", "rope", "test", "cut", 20, height=300, width=200),
        sample("mvtec3d", "rope", "test", "good", 21),
    ]
    made += [sample("mvtec3d", "tire", "test", "hole", seed) for seed in (30, 31)]
    made += [sample("eyecandies", "<b>&bold", "val", "good", seed) for seed in range(40, 44)]
    for seed in range(50, 55):
        record = {"relief": 0.02 * (seed - 48), "disparity": {"low": 1.0, "high": seed / 10}, "conversion": "linear"}
        made.append(sample("visa", "candle", "train", "good", seed, kind="relative", pseudo_depth=record))
    return made


def sources() -> dict[str, dict]:
    return {
        "mvtec3d": REAL | {"dropped": [*DROPPED, *FLAT]}, "eyecandies": dict(RENDERED), "visa": dict(ESTIMATED)
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A shard folder, its manifest and the page about it."""
    root = tmp_path_factory.mktemp("inspect")
    manifest = write(root / "shards", samples(), sources())
    check(CheckConfig(str(root / "shards")))
    inspect(InspectConfig(str(root / "shards"), str(root / "page.html"), per_category=5))
    return root / "shards", manifest, (root / "page.html").read_text(encoding="utf-8")


def pictures(page: str) -> dict[str, np.ndarray]:
    """The pictures of a page by the key of their sample."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    return {key: np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data, key in found}


def rows(page: str) -> list[list[str]]:
    """The text of every cell of every row of every table."""
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_page_says_what_manifest_and_samples_say(finished):
    _, manifest, page = finished
    text, table = Checker(page).text, rows(page)
    assert "25 depth maps of 3 datasets in 4 shards" in text
    assert ["mvtec3d non-commercial", "16", "2", "6", "1", REAL["licence"]] in table
    assert ["eyecandies synthetic", "4", "1", "0", "0", "Apache-2.0"] in table
    assert ["visa pseudo-depth", "5", "1", "0", "0", "VisA, CC BY 4.0"] in table
    # Beside the published 298, 33, 32, 69 of rope and 210, 29, 25, 87 of tire.
    columns = ["category", "train good", "validation good", "test good", "test anomalous", "all"]
    rope = ["rope", "12 of 298, −286", "0 of 33, −33", "1 of 32, −31", "1 of 69, −68", "14"]
    tire = ["tire", "0 of 210, −210", "0 of 29, −29", "0 of 25, −25", "2 of 87, −85", "2"]
    assert columns in table and rope in table and tire in table
    assert ["rope, test", "cut 1 · good 1"] in table
    assert ["&lt;b&gt;&amp;bold", "4", "4"] in table  # of a rendered tree nothing is published
    assert ["A", "mvtec3d, eyecandies", "16 not all datasets", "19,647", "−19,631", "19,647"] in table
    assert ["B", "real_iad_d3", "none", "4,249", "", "8,450"] in table
    assert ["C", "mvtec_ad, mvtec_loco, mvtec_ad2, visa", "5 not all datasets", "22,632", "−22,627", "27,830"] in table
    assert ["depth estimated by", "owner/model"] in table and ["revision", "abc123"] in table
    assert ["licence of the model", "CC-BY-NC-4.0"] in table and ["preprocessed", "yes"] in table
    assert ["preprocessed reason", REAL["preprocessed_reason"]] in table and ["numpy", "9.8.7"] in table
    valid = [100 * meta["valid_fraction"] for _, _, meta in samples() if meta["dataset"] == "mvtec3d"]
    assert f"valid pixels median {np.median(valid):.3g} %" in text and text.count("published counts differ") == 2
    for expected in (
        "Non-commercial data: mvtec3d.", "40 of 40 published counts differ", "16 maps of 23 files",
        "4 maps of 4 files rendered in the layout of eyecandies", "This is synthetic, not the published dataset.",
        "6 files dropped as unusable", "5 × median depth is 0.5e-3 m rope/0.tiff, rope/1.tiff, rope/2.tiff, …",
        "1 × no image rope/9.tiff", "1 file without relief", "tile/<1>.png", "<b>&bold", "300 × 200", "20 × 30",
        "relief of disparity median 8 %", "range of disparity median 4.2",
        manifest["config_hash"],
    ):  # fmt: skip
        assert expected in text, expected


def test_page_says_the_range_of_the_input(tmp_path):
    """Of every source apart; a map of twice the relief doubles what lies well below the knee."""
    rows, columns = np.mgrid[:40, :50] / 50
    sources = {"low": 0.002, "high": 0.5}
    for name, relief in sources.items():
        (tmp_path / "raw" / name).mkdir(parents=True)
        for index in range(3):
            depth = 1 + 0.1 * columns - relief * (np.hypot(rows - 0.4, columns - 0.1 * index - 0.3) < 0.1)
            np.save(tmp_path / "raw" / name / f"{index}.npy", depth.astype(np.float32))
        options = FolderOptions(unit="m", split="train", name=name)
        prepare(PrepareConfig("folder", str(tmp_path / "raw" / name), str(tmp_path / name), 1, folder=options))
        inspect(InspectConfig(str(tmp_path / name), str(tmp_path / f"{name}.html")))
        text = Checker((tmp_path / f"{name}.html").read_text()).text
        found = re.search(r"in the 3 maps shown below: ([-\d.]+) to ([-\d.]+); in a middle one 98 % .* between", text)
        values = [normalize(sample_of(tmp_path / name, index), Normalization()) for index in range(3)]
        assert float(found[1]) == pytest.approx(min(each.min() for each in values), abs=0.006)
        assert float(found[2]) == pytest.approx(max(each.max() for each in values), abs=0.006)
        assert (float(found[2]) > 3) == (name == "high")


def sample_of(folder, index) -> DepthMap:
    with tarfile.open(folder / "depth-000000.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".png"))
        meta = json.load(tar.extractfile(names[index].removesuffix(".depth.png") + ".json"))
        return decode_png(tar.extractfile(names[index]).read(), meta["near"], meta["far"])


def test_page_needs_nothing_else(finished):
    _, _, page = finished
    parsed = Checker(page)
    assert "script" not in parsed.tags and "link" not in parsed.tags and "@import" not in page and "url(" not in page
    inside = [value for value in parsed.sources if not value.startswith("data:image/png;base64,")]
    assert inside == [f"#source-{place}" for place in (1, 2, 3)]
    assert not re.search(r"https?://", page) and len(page) < 200_000


def test_pictures_are_the_maps(finished):
    folder, _, page = finished
    shown = pictures(page)
    assert Counter(key.rsplit("/", 1)[0] for key in shown) == {
        "mvtec3d/rope": 5, "mvtec3d/tire": 2, "eyecandies/_b__bold": 4, "visa/candle": 5
    }  # fmt: skip
    stored = {key: (png, meta) for key, png, meta in samples()}
    for key, pixels in shown.items():
        png, meta = stored[key]
        found = shrink(decode_png(png, meta["near"], meta["far"], meta["kind"]), THUMBNAIL)
        assert pixels.shape[:2] == found.depth.shape and max(pixels.shape) <= THUMBNAIL
        assert np.array_equal((pixels == MISSING).all(-1), ~found.valid)
        # Of viridis green rises all the way: near is bright.
        depth, green = found.depth[found.valid], pixels[found.valid][:, 1].astype(int)
        assert (np.diff(green[np.argsort(depth, kind="stable")]) <= 0).all() and np.ptp(green) > 150
    scale, meta = 1000, stored[next(key for key in shown if key.startswith("mvtec3d/tire"))][1]
    caption = f"{scale * meta['near']:.4g}–{scale * meta['far']:.4g} mm"
    assert f"test · hole {caption}" in Checker(page).text


def test_draw_depends_on_samples_and_seed_alone(tmp_path):
    made = samples()
    write(tmp_path / "a", made, sources(), per_shard=3)
    write(tmp_path / "b", made[::-1], sources(), per_shard=25)
    drawn = []
    for folder, seed in (("a", 0), ("b", 0), ("a", 1)):
        inspect(InspectConfig(str(tmp_path / folder), str(tmp_path / "page.html"), per_category=4, seed=seed))
        drawn.append(pictures((tmp_path / "page.html").read_text(encoding="utf-8")))
    assert list(drawn[0]) == list(drawn[1]) and drawn[0].keys() != drawn[2].keys()
    assert all(np.array_equal(drawn[0][key], drawn[1][key]) for key in drawn[0])


def test_every_map_is_drawn_equally_often(tmp_path):
    write(tmp_path / "a", [made for made in samples() if made[2]["category"] == "rope"], {"mvtec3d": dict(REAL)})
    seen: Counter[str] = Counter()
    for seed in range(30):
        inspect(InspectConfig(str(tmp_path / "a"), str(tmp_path / "page.html"), per_category=3, seed=seed))
        seen.update(pictures((tmp_path / "page.html").read_text(encoding="utf-8")).keys())
    # 30 draws of 3 of 14: 6.4 each, standard deviation 2.2.
    assert len(seen) == 14 and max(seen.values()) <= 15


def test_page_stays_small_with_many_categories(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_module, "MAPS_SHOWN", 20)
    source = {"reader": "folder", "licence": "CC0", "synthetic": False}
    for categories, each in ((6, 3), (30, 1)):
        made = [sample("own", f"{chr(97 + c % 26)}{'x' * (c // 26)}", "train", "good", c * 5 + n)
                for c in range(categories) for n in range(5)]  # fmt: skip
        write(tmp_path / f"{categories}", made, {"own": dict(source)})
        inspect(InspectConfig(str(tmp_path / f"{categories}"), str(tmp_path / "page.html")))
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert len(pictures(page)) == min(categories, 20) * each and f"Up to {each} maps" in page
        assert page.count("no room for pictures") == max(0, categories - 20)


def test_only_maps_that_are_shown_are_decoded(tmp_path):
    made = [sample("mvtec3d", "rope", "train", "good", seed) for seed in range(9)]
    write(tmp_path / "a", made, {"mvtec3d": dict(REAL)})
    inspect(InspectConfig(str(tmp_path / "a"), str(tmp_path / "page.html"), per_category=2))
    shown = pictures((tmp_path / "page.html").read_text(encoding="utf-8")).keys()
    write(tmp_path / "b", [(k, png if k in shown else b"no PNG", m) for k, png, m in made], {"mvtec3d": dict(REAL)})
    inspect(InspectConfig(str(tmp_path / "b"), str(tmp_path / "page.html"), per_category=2))
    with pytest.raises(DataError, match=r"depth-00000\d.tar: sample mvtec3d/rope/train-good-\d+: unreadable depth PNG"):
        inspect(InspectConfig(str(tmp_path / "b"), str(tmp_path / "page.html"), per_category=3))


def test_sparse_maps_are_shown(tmp_path):
    key, _, meta = sample("mvtec3d", "rope", "train", "good", 0, height=300, width=300)
    valid = np.zeros((300, 300), bool)
    valid[::3, ::3] = True  # the corner of each block of 3 x 3
    made = DepthMap(np.full((300, 300), 0.5), valid)
    png, near, far = encode_png(made)
    meta |= {"near": near, "far": far, "valid_fraction": float(valid.mean())}
    write(tmp_path / "a", [(key, png, meta)], {"mvtec3d": dict(REAL)})
    inspect(InspectConfig(str(tmp_path / "a"), str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (pixels,) = pictures(page).values()
    assert "In every map: nearest depth 500 mm, farthest depth 500 mm, range of depth 0 mm" in Checker(page).text
    assert pixels.shape == (100, 100, 3) and (pixels != MISSING).any(-1).all()


def test_prepared_shards(shards, tmp_path, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    inspect(InspectConfig(str(shards), str(tmp_path / "deep" / "page.html")))
    assert before == {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'deep' / 'page.html'}: 84 maps, 24 of them shown")
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert ["shape0", "20", "8", "28"] in rows(page) and "Beside the paper" not in page


def test_remote_shards_give_the_same_page(finished, tmp_path):
    folder, _, page = finished
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/inspect/shards/{path.name}", path.read_bytes())
    try:
        inspect(InspectConfig("memory://inspect/shards", str(tmp_path / "a.html"), 5, cache=str(tmp_path / "cache")))
    finally:
        memory.rm("/inspect", recursive=True)
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page


# Figures


def test_histogram_counts_every_value():
    random = np.random.default_rng(0)
    for values in (random.normal(5, 1, 500), random.integers(0, 3, 50).astype(float), np.array([2.0, 3.0])):
        found = histogram("x", "", values)
        width, most = Histogram.WIDTH / 32, found.most
        edges = np.linspace(values.min(), values.max(), 33)
        slow = [sum((low <= values) & ((values < high) | (high == edges[-1])))
                for low, high in zip(edges, edges[1:], strict=False)]  # fmt: skip
        assert most == max(slow) and len(found.bars) == np.count_nonzero(slow) and not found.logarithmic
        for x, y, _, height in found.bars:
            expected = Histogram.HEIGHT * slow[round(x / width)] / most
            assert height == pytest.approx(max(expected, 1), abs=0.01) and y + height == pytest.approx(Histogram.HEIGHT)
        middle = (np.median(values) - values.min()) / np.ptp(values)
        assert found.middle == pytest.approx(Histogram.WIDTH * middle, abs=0.06)


def test_histogram_of_wide_ranges_is_logarithmic_and_of_constants_none():
    found = histogram("range", "m", np.array([0.01, 0.1, 0.1, 10.0]))
    assert found.logarithmic and found.ends == ("0.01", "10") and found.median == "0.1 m"
    assert found.middle == pytest.approx(Histogram.WIDTH / 3, abs=0.1)
    assert histogram("range", "m", np.array([0.01, 0.5])).ends == ("10", "500")  # millimetres
    same = histogram("near", "relative", np.full(7, 0.9))
    assert (same.bars, same.median) == ([], "0.9 relative")
    assert histogram("zero", "m", np.zeros(3)).bars == []


def test_count_table_stands_beside_what_is_published():
    counts = Counter(
        {("a", "train", "good"): 3, ("a", "test", "cut"): 2, ("a", "test", "hole"): 1, ("b", "val", "good"): 4}
    )
    published = [
        ("a", "train", "good", 3), ("a", "test", "anomalous", 4), ("c", "train", "good", 9),
        (None, "val", None, 4), ("a", None, None, 7),
    ]  # fmt: skip
    table = count_table(counts, published)
    assert table["columns"] == [("train", "good"), ("val", "good"), ("test", "anomalous")]
    assert table["rows"] == [("a", [(3, 3), (0, None), (3, 4)], 6), ("b", [(0, None), (4, None), (0, None)], 4)]
    assert [(place, found) for place, found in table["loose"]] == [(published[3], 4), (published[4], 6)]
    assert (table["absent"], table["published"], table["differing"]) == (["c"], 5, 3)
    assert table["labels"]["a", "test"] == ["cut 2", "hole 1"]
    assert count_table(counts, [])["differing"] == 0


def test_defects_that_are_published_apart_are_counted_apart():
    counts = Counter({("a", "test", "logical"): 3, ("a", "test", "structural"): 2})
    table = count_table(counts, [("a", "test", "logical", 3), ("a", "test", "structural", 4)])
    assert table["columns"] == [("test", "logical"), ("test", "structural")] and table["labels"] == {}
    assert table["rows"] == [("a", [(3, 3), (2, 4)], 5)]


def test_reasons_are_grouped_without_their_numbers():
    drops = [{"path": "z", "reason": "other"}]
    drops += [{"path": f"{n}", "reason": f"relief -{n}.5e-07 is below 0.{n}"} for n in range(1, 6)]
    groups = drop_groups(drops)
    assert [(group["reason"], group["count"], group["paths"]) for group in groups] == [
        ("relief -1.5e-07 is below 0.1", 5, ["1", "2", "3"]), ("other", 1, ["z"])
    ]  # fmt: skip


def test_paper_counts_and_released_counts():
    for _, names, _, released in PAPER:
        modules = {name: import_module(f"data_prep.{name}") for name in names}
        # Of Real-IAD D3 training and test lists make up the dataset; the validation list repeats test maps.
        places = [
            place for name, module in modules.items() for place in module.PUBLISHED
            if name != "real_iad_d3" or place[:2] in ((None, "train"), (None, "test"))
        ]  # fmt: skip
        assert sum(place[3] for place in places) == released
    sources = {name: {"reader": name, "maps": 10, "synthetic": name == "visa"} for name in ("mvtec_ad", "visa")}
    assert [row["here"] for row in paper_table({"sources": sources})] == [0, 0, 10]
    assert paper_table({"sources": {"visa": sources["visa"]}}) == []


def test_non_commercial_licences_are_recognised():
    for licence in (mvtec3d.LICENCE, mvtec_ad.LICENCE, "CC-BY-NC-4.0", "Non-Commercial", "noncommercial use"):
        assert non_commercial(licence), licence
    for licence in (visa.LICENCE, "Apache-2.0", "unstated", "CC BY-SA 4.0", "since 2020"):
        assert not non_commercial(licence), licence


# Colours


def test_colours_are_viridis_and_missing_pixels_their_own():
    values = np.array([[0.0, 1.0, 0.5, -9.0, 9.0, 1 / 9]])
    pixels = colour(values, np.array([[True, True, False, True, True, True]]), 0.0, 1.0)[0]
    assert [tuple(pixel) for pixel in pixels[:5]] == [(68, 1, 84), (253, 231, 37), MISSING, (68, 1, 84), (253, 231, 37)]
    assert tuple(pixels[5]) == tuple(VIRIDIS[1])
    assert np.abs(VIRIDIS - MISSING).sum(1).min() > 100
    assert colour(np.ones((2, 2)), np.ones((2, 2), bool), 1.0, 1.0).shape == (2, 2, 3)


def test_colours_lie_between_their_neighbours():
    places = np.random.default_rng(0).random(500)
    exact = np.stack([np.interp(9 * places, range(10), channel) for channel in VIRIDIS.T], 1)
    found = colour(places[None], np.ones((1, 500), bool), 0.0, 1.0)[0]
    # Half a level away at most, where neighbouring colours differ by 72 / 28.
    assert np.abs(found - exact).max() <= 0.5 * 72 / 28 + 0.5


@pytest.mark.parametrize("colours", [1, 2, 256, 257, 5000])
def test_pictures_are_lossless(colours):
    random = np.random.default_rng(colours)
    chosen = np.unique(random.integers(0, 256, (colours, 3), np.uint8), axis=0)
    pixels = np.resize(random.permutation(chosen), (70, 90, 3))
    with Image.open(io.BytesIO(base64.b64decode(data_uri(pixels).removeprefix("data:image/png;base64,")))) as image:
        assert image.mode == ("P" if len(chosen) <= 256 else "RGB")
        assert np.array_equal(np.array(image.convert("RGB")), pixels)


# Bad input


def unfinished(folder):
    (folder / ".progress").mkdir()


def without_manifest(folder):
    (folder / "manifest.json").unlink()


def without_shard(folder):
    (folder / "depth-000001.tar").unlink()


def shard_cut_short(folder):
    path = folder / "depth-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])


def overwrite(folder, place: int, content: bytes):
    path = folder / "depth-000001.tar"
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


def broken_first_header(folder):
    overwrite(folder, 0, b"\xff" * 512)


def broken_later_header(folder):
    with tarfile.open(folder / "depth-000001.tar") as tar:
        place = tar.getmembers()[6].offset
    overwrite(folder, place, b"\xff" * 512)


def broken_json(folder):
    with tarfile.open(folder / "depth-000001.tar") as tar:
        place = tar.getmembers()[3].offset_data
    overwrite(folder, place, b"[")


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def other_counts(folder):
    edit(folder, lambda manifest: manifest["counts"]["mvtec3d"]["rope"]["train"].update(good=13))


def other_sources(folder):
    edit(folder, lambda manifest: manifest["sources"].pop("visa"))


def other_drops(folder):
    edit(folder, lambda manifest: manifest["sources"]["mvtec3d"]["dropped"].append("a.tiff"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfinished, "is unfinished"),
        (without_manifest, "has no manifest.json"),
        (without_shard, r"depth-000001.tar: the shard is missing"),
        (shard_cut_short, r"depth-000001.tar: 5000 bytes, the manifest says \d+"),
        (broken_first_header, r"depth-000001.tar: broken tar after sample \(none\)"),
        (broken_later_header, r"depth-000001.tar: 3 samples, the manifest says 7; the last is mvtec3d/.*-009"),
        (broken_json, r"depth-000001.tar: sample mvtec3d/rope/train-good-008: json cannot be read"),
        (other_counts, r"manifest.json disagrees with the samples: counts.mvtec3d.rope.train.good was 13, now 12"),
        (other_sources, r"manifest.json: sources and samples disagree about visa"),
        (other_drops, r"manifest.json: sources.mvtec3d.dropped holds no path, reason and flat"),
    ],
)  # fmt: skip
def test_faults_are_one_line(finished, tmp_path, damage, message):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        inspect(InspectConfig(str(folder), str(tmp_path / "page.html")))
    assert "\n" not in str(caught.value) and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("near", float("nan")), ("near", 9.0), ("far", "1"), ("far", True), ("valid_fraction", 0), ("height", None),
        ("label", 3), ("category", None), ("kind", "feet"),
    ],
)  # fmt: skip
def test_descriptions_are_checked(tmp_path, key, value):
    made = sample("mvtec3d", "rope", "train", "good", 0)
    made[2][key] = value
    write(tmp_path / "a", [made], {"mvtec3d": dict(REAL)})
    with pytest.raises(DataError, match=rf"depth-000000.tar: sample mvtec3d/rope/train-good-000: json: {key}"):
        inspect(InspectConfig(str(tmp_path / "a"), str(tmp_path / "page.html")))


def test_records_of_estimation_are_optional(tmp_path):
    records = [None, [], {"relief": "high"}, {"relief": float("nan"), "disparity": 3}, {"disparity": {"low": 1}}]
    made = [sample("visa", "candle", "train", "good", seed, pseudo_depth=record) for seed, record in enumerate(records)]
    write(tmp_path / "a", made, {"visa": dict(ESTIMATED)})
    inspect(InspectConfig(str(tmp_path / "a"), str(tmp_path / "page.html")))
    assert "of disparity" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_cannot_work_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="per_category must be at least 1, got 0"):
        inspect(InspectConfig(str(finished[0]), str(tmp_path / "page.html"), per_category=0))
    with pytest.raises(ConfigError, match="is a folder"):
        inspect(InspectConfig(str(finished[0]), str(tmp_path)))


# In a browser


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_browser_shows_every_picture_and_complains_of_nothing(finished, tmp_path, width):
    _, _, page = finished
    # Added to a copy, because the page itself forbids scripts.
    measure = """<script>addEventListener("load", () => {
        document.querySelectorAll("img").forEach(image => image.loading = "eager");
        const shown = [...document.images].filter(image => image.complete && image.naturalWidth).length;
        document.title = `${shown} pictures, ${document.documentElement.scrollWidth - innerWidth} too wide`;
    })</script>"""
    policy = re.search(r"<meta http-equiv=[^>]+>", page)[0]
    for name, content in (("page", page), ("copy", page.replace(policy, "").replace(' loading="lazy"', "") + measure)):
        (tmp_path / f"{name}.html").write_text(content, encoding="utf-8")
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", f"--window-size={width},2000", "--dump-dom", f"file://{tmp_path}/{name}.html",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0 and "CONSOLE" not in run.stderr, run.stderr
        assert run.stdout.count("<img ") == len(pictures(page)) == 16
    title = re.search(r"<title>(\d+) pictures, (-?\d+) too wide", run.stdout)
    assert int(title[1]) == 16 and int(title[2]) <= 0
