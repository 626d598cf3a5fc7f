"""Files in folders and archives: one tree whatever holds it, read once, and never more than was promised."""

import gzip
import io
import itertools
import lzma
import os
import random
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import archives
from data_prep.archives import RawFile
from data_prep.folder import FolderOptions
from data_prep.listing import list_source
from data_prep.tree import RawTree
from dino_depth.anomaly.benchmarks import eyecandies12, sim3d
from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions
from dino_depth.bench.sources import Options, open_source
from dino_depth.errors import DataError
from dino_depth.inspection.convert import ConvertConfig, convert
from dino_depth.inspection.parts import instance_folders, read_instance

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2", "tgz"]
COMPRESSED = ["tar.gz", "tar.xz", "tar.bz2"]
BLOCK = tarfile.BLOCKSIZE
FILES = {
    "cat.v1/train/good/000.png": bytes(range(256)) * 5,
    "cat.v1/train/good/a-b_c.0.png": b"x" * BLOCK,
    "cat.v1/notes.json": b'{"a": 1}',
    "other/deep/er/d\u00e9j\u00e0 vu.tiff": b"tiff" * 300,
    "top.csv": b"a,b\n1,2\n",
}
ENTRIES = list(FILES.items())


def pack_tar(members, format=tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name or header, content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for header, content in members:
            if isinstance(header, str):
                header = tarfile.TarInfo(header)
                header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def squeeze(content: bytes, kind: str) -> bytes:
    if kind in ("tar.gz", "tgz"):
        return gzip.compress(content, mtime=0)
    return {
        "tar.xz": lambda: lzma.compress(content, preset=0),
        "tar.bz2": lambda: archives.bz2.compress(content),
    }.get(kind, lambda: content)()


def pack(path: Path, members=ENTRIES) -> Path:
    """An archive of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
    else:
        kind = next(kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.endswith(f".{kind}"))
        path.write_bytes(squeeze(pack_tar(members), kind))
    return path


def spread(root: Path, members=ENTRIES) -> Path:
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def contents(tree: RawTree) -> dict[str, bytes]:
    ordered = sorted(tree.names, key=lambda name: (tree[name].order, name))
    return {name: tree[name].read() for name in ordered}


def refused(path: Path) -> str:
    """The one line with which a tree is refused."""
    with pytest.raises(DataError) as error:
        RawTree(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# One tree, whatever holds it


def test_a_folder_and_every_kind_of_archive_hold_the_same_tree(tmp_path):
    trees = [RawTree(spread(tmp_path / "folder"))]
    trees += [RawTree(pack(tmp_path / f"packed.{kind}")) for kind in KINDS]
    for tree in trees:
        assert tree.names == sorted(FILES)
        assert contents(tree) == FILES
        assert all(tree[name].read_head() == content[:64] for name, content in FILES.items())
        assert all(tree[name].name == name.rpartition("/")[2] for name in FILES)
        assert "top.csv" in tree and "absent" not in tree
    assert [tree.name for tree in trees] == ["folder"] + ["packed"] * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_archives_below_a_folder_are_opened_only_where_nothing_else_matches(tmp_path, kind):
    pack(tmp_path / "data" / f"first.x.{kind}", [("train/0.png", b"0"), ("train/1.png", b"1")])
    pack(tmp_path / "data" / f"second.{kind}", [("second/train/2.png", b"2")])
    spread(tmp_path, [("loose.png", b"3")])
    tree = RawTree(tmp_path)
    assert [name for _, name in tree.find(r".*/loose\.png")] == ["loose.png"]
    assert len(tree.names) == 3
    found = tree.find(r"(?:.*/)?(?P<category>[^/]+)/train/(?P<stem>\d)\.png")
    assert [(match["category"], match["stem"]) for match, _ in found] == [
        ("first.x", "0"),
        ("first.x", "1"),
        ("second", "2"),
    ]
    assert [tree[name].read() for _, name in found] == [b"0", b"1", b"2"]
    assert not tree.mount_archives()


def test_an_archive_beside_its_unpacked_folder_is_left_alone(tmp_path):
    pack(tmp_path / "bottle.tar.xz", [("bottle/packed.png", b"packed")])
    spread(tmp_path, [("bottle/loose.txt", b"loose")])
    tree = RawTree(tmp_path)
    assert tree.find(r".*\.png") == [] and "bottle/packed.png" not in tree


def test_a_pattern_sees_the_name_of_the_root(tmp_path):
    spread(tmp_path / "pcb-1.v2", [("train/0.png", b"0")])
    ((match, name),) = RawTree(tmp_path / "pcb-1.v2").find(r"(?P<category>[^/]+)/train/.*")
    assert match["category"] == "pcb-1.v2" and name == "train/0.png"


def test_hidden_files_are_left_out(tmp_path):
    hidden = [(".DS_Store", b"x"), ("a/._0.png", b"x"), ("__MACOSX/a/0.png", b"x"), (".git/a/0.png", b"x")]
    spread(tmp_path / "folder", [*hidden, ("a/0.png", b"0")])
    for root in (
        tmp_path / "folder",
        *(pack(tmp_path / f"x.{kind}", [*hidden, ("./a/0.png", b"0")]) for kind in KINDS),
    ):
        assert contents(RawTree(root)) == {"a/0.png": b"0"}


def test_what_is_neither_folder_nor_archive_is_refused(tmp_path):
    (tmp_path / "file.png").write_bytes(b"x")
    assert "is neither a folder nor a zip or tar archive" in refused(tmp_path / "file.png")
    assert "nothing is there" in refused(tmp_path / "absent")


@pytest.mark.parametrize("called", ["zip", "tar", "tar.gz", "tar.xz", "tgz"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_what_its_bytes_say_whatever_it_is_called(tmp_path, called, kind):
    """Eyecandies ships tars named .zip; downloads lose and change endings."""
    path = pack(tmp_path / f"packed.{kind}").rename(tmp_path / f"other.{called}")
    assert contents(RawTree(path)) == FILES
    (tmp_path / "root").mkdir()
    path.rename(tmp_path / "root" / path.name)
    tree = RawTree(tmp_path / "root")
    assert tree.mount_archives()
    unpacked = {name: tree[name].read() for name in tree.names if name != path.name}
    assert unpacked == {f"other/{name}": content for name, content in FILES.items()}


def test_a_zip_behind_a_program_and_a_tar_with_a_zip_inside(tmp_path):
    path = pack(tmp_path / "a.zip")
    path.write_bytes(b"#!/bin/sh\nexec unzip $0\n" + path.read_bytes())
    assert contents(RawTree(path)) == FILES
    (tmp_path / "b.zip").write_bytes(pack_tar([("inner.zip", pack(tmp_path / "c.zip").read_bytes())]))
    assert RawTree(tmp_path / "b.zip").names == ["inner.zip"]


# Read once


class Watched:
    """A decompressed stream that notes every place it is sent to."""

    def __init__(self, file, journal):
        self.file, self.journal = file, journal

    def seek(self, place):
        self.journal.append((self.file.tell(), place))
        return self.file.seek(place)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("kind", COMPRESSED)
def test_reading_in_order_decompresses_an_archive_once(tmp_path, monkeypatch, kind):
    random.seed(0)
    names = [f"{random.randrange(1000):03}/{index}.png" for index in range(40)]
    path = pack(tmp_path / f"many.{kind}", [(name, random.randbytes(random.randrange(1, 3000))) for name in names])
    journal = []
    magic = next(magic for magic in archives.COMPRESSED if path.read_bytes().startswith(magic))
    opener = archives.COMPRESSED[magic]
    monkeypatch.setitem(archives.COMPRESSED, magic, lambda *args: Watched(opener(*args), journal))
    tree = RawTree(path)
    assert all(place >= here for here, place in journal), "indexing went back"
    journal.clear()
    assert len(contents(tree)) == 40
    assert len(journal) == 40 and all(place >= here for here, place in journal)
    journal.clear()
    # The other way round is what the order is for: nearly every file goes back.
    for name in reversed(sorted(tree.names, key=lambda name: tree[name].order)):
        tree[name].read()
    assert sum(place < here for here, place in journal) >= 39


@pytest.mark.parametrize("kind", COMPRESSED)
def test_descriptions_and_heads_are_kept_while_indexing(tmp_path, kind):
    tree = RawTree(pack(tmp_path / f"x.{kind}"))
    (tmp_path / f"x.{kind}").unlink()
    assert tree["cat.v1/notes.json"].read() == FILES["cat.v1/notes.json"]
    assert tree["top.csv"].read() == FILES["top.csv"]
    assert tree["cat.v1/train/good/000.png"].read_head() == FILES["cat.v1/train/good/000.png"][:64]
    with pytest.raises(DataError, match="cannot be read"):
        tree["cat.v1/train/good/000.png"].read()


def test_kept_descriptions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "KEPT_DESCRIPTIONS", 100)
    tree = RawTree(pack(tmp_path / "x.tar.gz", [(f"{place}.json", b"x" * 60) for place in range(3)]))
    assert [file.content is not None for file in map(tree.__getitem__, tree.names)] == [True, False, False]
    assert contents(tree) == {f"{place}.json": b"x" * 60 for place in range(3)}


def test_uncompressed_files_have_no_order(tmp_path):
    for tree in (RawTree(spread(tmp_path / "f")), RawTree(pack(tmp_path / "x.zip")), RawTree(pack(tmp_path / "x.tar"))):
        assert {tree[name].order for name in tree.names} == {("", 0)}


def test_a_stamp_changes_with_the_content(tmp_path):
    for kind in ("zip", "tar", "tar.gz"):
        before = RawTree(pack(tmp_path / f"x.{kind}", [("a.png", b"one")]))["a.png"].stamp()
        assert before == RawTree(tmp_path / f"x.{kind}")["a.png"].stamp()
        after = RawTree(pack(tmp_path / f"y.{kind}", [("a.png", b"others")]))["a.png"].stamp()
        assert before != after
    root = spread(tmp_path / "folder", [("a.png", b"one")])
    before = RawTree(root)["a.png"].stamp()
    spread(root, [("a.png", b"others")])
    assert RawTree(root)["a.png"].stamp() != before


@pytest.mark.parametrize("time", ["nan", "inf", "-inf", "1e300"])
def test_a_stamp_survives_an_absurd_time(tmp_path, time):
    header = tarfile.TarInfo("a.png")
    header.size, header.pax_headers = 3, {"mtime": time}
    (tmp_path / "x.tar").write_bytes(pack_tar([(header, b"abc")]))
    size, _ = RawTree(tmp_path / "x.tar")["a.png"].stamp()
    assert size == 3


# Damage


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path, kind):
    whole = pack(tmp_path / f"whole.{kind}").read_bytes()
    path = tmp_path / f"cut.{kind}"
    for length in sorted({*range(0, len(whole) - 1, max(1, len(whole) // 60)), 1, len(whole) // 2}):
        path.write_bytes(whole[:length])
        if kind == "tar" and length >= len(pack_tar(ENTRIES)) - 10240 and not any(whole[length - BLOCK : length]):
            break  # behind the mark there is padding only
        try:
            tree = RawTree(path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            # Padding that compresses well may be all that is missing: then nothing of the content is.
            assert contents(tree) == FILES and kind not in ("zip", "tar")


@pytest.mark.parametrize("kind", ["tar", *COMPRESSED])
def test_a_tar_without_its_end_is_refused_at_every_boundary(tmp_path, kind):
    """Also when it was cut before it was compressed, where no checksum tells."""
    whole = pack_tar([("a.png", b"a" * 700), ("b.png", b"b" * BLOCK), ("empty.png", b""), ("c.png", b"c")])
    boundaries = [BLOCK + 1024, BLOCK + 1024 + 2 * BLOCK, BLOCK + 1024 + 3 * BLOCK, BLOCK + 1024 + 5 * BLOCK]
    for boundary in boundaries:
        for length in (boundary, boundary - 1, boundary + 100):
            if length > boundaries[-1]:
                continue
            (tmp_path / f"x.{kind}").write_bytes(squeeze(whole[:length], kind))
            refused(tmp_path / f"x.{kind}")
    (tmp_path / f"x.{kind}").write_bytes(squeeze(whole[: boundaries[-1] + BLOCK], kind))
    assert len(RawTree(tmp_path / f"x.{kind}").names) == 4


@pytest.mark.parametrize("kind", ["tar", *COMPRESSED])
def test_a_damaged_header_does_not_hide_the_files_behind_it(tmp_path, kind):
    damaged = bytearray(pack_tar([("a.png", b"a" * BLOCK), ("b.png", b"b"), ("c.png", b"c")]))
    damaged[2 * BLOCK : 2 * BLOCK + 8] = b"\xff" * 8
    (tmp_path / f"x.{kind}").write_bytes(squeeze(bytes(damaged), kind))
    assert "cut short after 1 files" in refused(tmp_path / f"x.{kind}")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_a_damaged_content_is_noticed(tmp_path, kind):
    noise = random.Random(0).randbytes(50_000)
    path = pack(tmp_path / f"x.{kind}", [("a.png", noise), ("b.png", noise[::-1])])
    damaged = bytearray(path.read_bytes())
    damaged[20_000] ^= 0x55
    path.write_bytes(damaged)
    try:
        tree = RawTree(path)
    except DataError:
        return
    with pytest.raises(DataError, match="cannot be read from its archive"):
        tree["a.png"].read()
    assert tree["b.png"].read() == noise[::-1]


def test_an_archive_replaced_after_listing_is_a_reason_for_each_file(tmp_path):
    tree = RawTree(pack(tmp_path / "x.tar", [("a.png", b"a" * 5000)]))
    (tmp_path / "x.tar").write_bytes(b"short")
    with pytest.raises(DataError, match="its archive promises 5000 bytes and holds 0|is empty"):
        tree["a.png"].read()
    tree = RawTree(pack(tmp_path / "y.zip", [("a.png", b"a" * 5000)]))
    pack(tmp_path / "y.zip", [("b.png", b"b")])
    with pytest.raises(DataError, match="cannot be read from its archive"):
        tree["a.png"].read()


def test_a_file_that_vanishes_after_listing_is_a_reason_without_its_path(tmp_path):
    tree = RawTree(spread(tmp_path))
    (tmp_path / "top.csv").unlink()
    for reading in (tree["top.csv"].read, tree["top.csv"].read_head):
        with pytest.raises(DataError) as error:
            reading()
        assert str(error.value) == "cannot be read: No such file or directory"
    assert tree["top.csv"].stamp() == (-1, -1)


def test_empty_and_oversized_files_are_refused(tmp_path):
    members = [("empty.png", b""), ("large.png", b"x" * 3000)]
    for root in (spread(tmp_path / "f", members), *(pack(tmp_path / f"x.{kind}", members) for kind in KINDS)):
        tree = RawTree(root)
        with pytest.raises(DataError, match="the file is empty"):
            tree["empty.png"].read()
        with pytest.raises(DataError, match="larger than 0 MiB"):
            tree["large.png"].read(most=2999)
        assert len(tree["large.png"].read(most=3000)) == 3000


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    spread(tmp_path)
    scan = os.scandir

    def deny(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"other/deep: cannot be listed: Permission denied"):
        RawTree(tmp_path)


def test_a_folder_that_vanishes_while_it_is_listed_is_refused(tmp_path, monkeypatch):
    spread(tmp_path)
    look = os.stat

    def vanish(path, *args, **kwargs):
        if str(path).endswith("deep"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", vanish)
    with pytest.raises(DataError, match=r"other/deep: cannot be listed: No such file"):
        RawTree(tmp_path)


def test_links_in_folders_are_followed_but_not_in_circles(tmp_path):
    root = spread(tmp_path / "root", [("a/1.png", b"1"), ("elsewhere/0.png", b"0")])
    (root / "linked").symlink_to(root / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "a" / "dangling.png").symlink_to("../absent")
    (tmp_path / "root, linked").symlink_to(root)
    for place in (root, tmp_path / "root, linked"):
        tree = RawTree(place)
        assert tree.names == ["a/1.png", "a/dangling.png", "elsewhere/0.png", "linked/0.png"]
        assert tree["linked/0.png"].read() == b"0"
        with pytest.raises(DataError, match="cannot be read: No such file"):
            tree["a/dangling.png"].read()


@pytest.mark.parametrize("kind", ["file", "folder", "archive", "link to a link", "nothing"])
@pytest.mark.parametrize("reader", ["folder", "mvtec_ad"])
def test_links_out_of_the_root_are_refused(tmp_path, kind, reader):
    """Also to a folder whose name begins like the root's."""
    outside = spread(tmp_path / "root-secret", [("0.png", b"0"), ("0.zip", b"0")])
    root = spread(tmp_path / "root", [("bottle/train/good/1.png", b"1")])
    target = {"file": outside / "0.png", "archive": outside / "0.zip", "nothing": outside / "absent"}.get(kind, outside)
    if kind == "link to a link":
        (outside / "on").symlink_to(outside)
        target = Path("..", "..", "root-secret", "on")
    (root / "bottle" / "out").symlink_to(target)
    with pytest.raises(DataError, match=r"bottle/out is a link to .*root-secret.*out of root .*root: name a root"):
        list_source(reader, str(root), FolderOptions() if reader == "folder" else None)


def sim3d_of(root: Path):
    (root / "nut" / "nut_real").mkdir(parents=True)
    sim3d.open_benchmark(str(root), Sim3dOptions())


def eyecandies12_of(root: Path):
    (root / "VIEWS.json").touch()
    (root / "Lollipop" / "train").mkdir(parents=True)
    eyecandies12.open_benchmark(str(root))


def converted(root: Path):
    convert(ConvertConfig("bop", str(root), str(root.parent / "converted")))


def benched(root: Path):
    open_source(str(root), Options(frames=2, objects=1, views=2, seed=0))


def instance(root: Path):
    (root / "view_01").mkdir()
    read_instance(root)


@pytest.mark.parametrize("reading", [sim3d_of, eyecandies12_of, converted, benched, instance, instance_folders])
def test_readers_that_list_folders_by_themselves_refuse_links_out_as_well(tmp_path, reading):
    outside = spread(tmp_path / "secret", [("view_01/image.png", b"0"), ("0.png", b"0")])
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(outside)
    with pytest.raises(DataError, match=r"root/out is a link to .*secret, out of root .*root: name a root"):
        reading(tmp_path / "root")


def test_a_rig_is_no_link_out_of_its_folder(tmp_path):
    spread(tmp_path, [("secret.json", b"{}"), ("parts/part/view_01/image.png", b"0"), ("parts/shared.json", b"{}")])
    rig = tmp_path / "parts" / "rig.json"
    for target, said in (("../secret.json", "out of root"), ("shared.json", "format is None")):
        rig.unlink(missing_ok=True)
        rig.symlink_to(target)
        with pytest.raises(DataError, match=rf"rig.json.*{said}"):
            read_instance(tmp_path / "parts" / "part")


def test_a_pipe_among_the_files_is_empty_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.tar")
    tree = RawTree(tmp_path)
    for reading in (tree["a.png"].read, tree.mount_archives):
        with pytest.raises(DataError, match="empty|is not a file"):
            reading()
    assert tree["a.png"].read_head() == b""


# Hostile archives


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "\\x.png", "c:x"]
)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_names_that_lead_outside_are_refused(tmp_path, name, kind):
    pack(tmp_path / f"x.{kind}", [("a.png", b"a"), (name, b"x")])
    assert "would lie outside of it" in refused(tmp_path / f"x.{kind}")


def test_backslashes_separate_folders(tmp_path):
    for kind in ("zip", "tar"):
        assert contents(RawTree(pack(tmp_path / f"x.{kind}", [("a\\b.png", b"x")]))) == {"a/b.png": b"x"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_files_that_grow_a_thousandfold_are_refused(tmp_path, monkeypatch, kind):
    pack(tmp_path / f"x.{kind}", [("a.png", bytes(3 * 10**6))])
    assert RawTree(tmp_path / f"x.{kind}").names == ["a.png"]
    monkeypatch.setattr(archives, "RATIO_MATTERS", 10**6)
    assert "grow to" in refused(tmp_path / f"x.{kind}") and "'a.png'" in refused(tmp_path / f"x.{kind}")


def test_a_zip_that_promises_less_than_it_holds_yields_no_more(tmp_path):
    path = pack(tmp_path / "x.zip", [("a.png", b"a" * 10**6)])
    lying = path.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 1000))
    path.write_bytes(lying)
    with pytest.raises(DataError, match="cannot be read from its archive"):
        RawTree(path)["a.png"].read()


def test_encrypted_members_are_refused(tmp_path):
    content = bytearray(pack(tmp_path / "x.zip", [("a.png", b"a" * 100)]).read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    assert "its member 'a.png' is encrypted" in refused(tmp_path / "x.zip")


def link(name: str, target: str, kind=tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header, b""


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_links_in_tars_stand_for_the_file_they_name(tmp_path, kind):
    members = [("a/0.png", b"0"), link("a/same.png", "0.png"), link("b/up.png", "../a/0.png")]
    members.append(link("b/hard.png", "a/0.png", tarfile.LNKTYPE))
    pack(tmp_path / f"x.{kind}", members)
    expected = {name: b"0" for name in ("a/0.png", "a/same.png", "b/up.png", "b/hard.png")}
    assert contents(RawTree(tmp_path / f"x.{kind}")) == expected


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "absent.png", "loop.png"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_to_what_a_tar_does_not_hold_are_refused(tmp_path, target, kind):
    pack(tmp_path / "x.tar", [("a.png", b"a"), link("loop.png", target, kind)])
    assert "which it does not hold" in refused(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zip"])
def test_of_duplicate_members_the_last_counts(tmp_path, kind):
    path = pack(tmp_path / f"x.{kind}", [("a.png", b"old"), ("b.png", b"b"), ("./a.png", b"newer")])
    assert contents(RawTree(path)) == {"a.png": b"newer", "b.png": b"b"}


def test_of_duplicate_members_of_a_zip_the_last_counts(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = pack(tmp_path / "x.zip", [("a.png", b"old"), ("a.png", b"newer")])
    assert contents(RawTree(path)) == {"a.png": b"newer"}


def test_devices_and_pipes_in_a_tar_are_left_out(tmp_path):
    members = [("a.png", b"a")]
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE):
        header = tarfile.TarInfo(f"special{kind.decode()}.png")
        header.type = kind
        members.append((header, b""))
    assert RawTree(pack(tmp_path / "x.tar", members)).names == ["a.png"]


def absurd(kind: bytes, size: int) -> bytes:
    """A header of any kind that promises any size, also less than nothing."""
    header = tarfile.TarInfo("a.json")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else (size % 2**96).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [2**33, 2**45, 2**80, -1, -BLOCK, -2 * BLOCK])
@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_absurd_sizes_in_headers_are_refused_before_memory_is_taken(tmp_path, size, type_, kind):
    files = pack_tar([("b.png", b"b" * 700)])
    path = tmp_path / f"x.{kind}"
    path.write_bytes(squeeze(files[: 3 * BLOCK] + absurd(type_, size) + files, kind))
    if size == -1 and type_ != tarfile.REGTYPE:
        outcome(path)  # rounds to no block at all
    else:
        refused(path)


# Anything at all


NUMBERS = itertools.count()


def fresh(folder: Path, kind: str) -> Path:
    """Another path for each example: an archive stays open for the next file that is read from it."""
    return folder / f"{next(NUMBERS)}.{kind}"


def outcome(path: Path):
    """Lists and reads whatever a path holds; only DataError may come of it."""
    try:
        tree = RawTree(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    for name in tree.names:
        assert not name.startswith("/") and ".." not in name.split("/")
        tree[name].stamp()
        try:
            assert len(tree[name].read(2**24)) <= 2**24
        except DataError as error:
            assert "\n" not in str(error) and str(path) not in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {kind: pack(folder / f"x.{kind}").read_bytes() for kind in KINDS}


@QUICK
@given(kind=st.sampled_from(KINDS), content=st.binary(max_size=2000))
def test_arbitrary_bytes_are_refused_or_a_tree(tmp_path, kind, content):
    path = fresh(tmp_path, kind)
    path.write_bytes(content)
    outcome(path)


@QUICK
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damaged_archives_are_refused_or_a_tree(tmp_path, whole, kind, data):
    content = bytearray(whole[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = fresh(tmp_path, kind)
    path.write_bytes(content)
    outcome(path)


@QUICK
@given(kind=st.sampled_from(["tar", "tar.gz"]), data=st.data())
def test_hostile_headers_are_refused_or_a_tree(tmp_path, kind, data):
    """Valid checksums around arbitrary fields, which damage alone never reaches."""
    blocks = bytearray(pack_tar([("a.png", b"a" * 700), ("b.json", b"{}")]))
    start = data.draw(st.sampled_from([0, 3 * BLOCK]))
    fields = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
    for _ in range(data.draw(st.integers(1, 3))):
        place, length = data.draw(st.sampled_from(fields))
        value = data.draw(st.binary(max_size=length))
        blocks[start + place : start + place + len(value)] = value
    blocks[start + 148 : start + 156] = b" " * 8
    blocks[start + 148 : start + 156] = b"%06o\0 " % sum(blocks[start : start + BLOCK])
    path = fresh(tmp_path, kind)
    path.write_bytes(squeeze(bytes(blocks), kind))
    outcome(path)


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@QUICK
@given(names=st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_arbitrary_names_in_zips_are_refused_or_read(tmp_path, names):
    outcome(pack(fresh(tmp_path, "zip"), [(name, b"x") for name in names]))


def test_a_raw_file_is_small_and_travels_to_other_processes(tmp_path):
    tree = RawTree(pack(tmp_path / "x.tar.gz"))
    shutil.copy(tmp_path / "x.tar.gz", tmp_path / "y.tar.gz")
    file = tree["cat.v1/train/good/000.png"]
    again = RawFile(**{name: getattr(file, name) for name in file.__dataclass_fields__})
    assert again == file and again.read() == FILES["cat.v1/train/good/000.png"]
