"""Shards at URLs: a loopback web server, memory:// and a small S3; every fault is injected, every bound is measured."""

import fcntl
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.check import CheckConfig, check
from data_prep.folder import FolderOptions
from data_prep.output import exclusive, publish, writing
from data_prep.shards import PrepareConfig, begin, finish, plan, prepare, write_share
from dino_depth import cli, storage
from dino_depth.config import DataConfig, parse
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.pretrain.run_folder import RunFolder
from dino_depth.shard_index import INDEX
from dino_depth.shards import DepthShards
from dino_depth.storage import RemotePath, ShardCache, location
from dino_depth.urls import redacted
from tests.conftest import depth_scene

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    monkeypatch.setenv("DINO_DEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0, 0.0))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, notes every GET, and lets ``fault(handler)`` answer first; it returns whether it did."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder, self.gets, self.fault = folder, [], None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is none."""

    def count(self, word: str = ".tar") -> int:
        return sum(word in path for path in self.gets)


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 - http.server's name
        self.server.gets.append(self.path)
        if not (self.server.fault and self.server.fault(self)):
            super().do_GET()

    def log_message(self, *_):
        """No line for each request."""

    def send(self, content: bytes, status: int = 200, length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serve():
    servers = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def first_times(number: int, word: str, answer):
    """A fault that answers the first ``number`` requests of paths that hold ``word``."""
    left = [number]

    def fault(handler) -> bool:
        if word not in handler.path or not left[0]:
            return False
        left[0] -= 1
        answer(handler)
        return True

    return fault


@pytest.fixture
def blobs(tmp_path) -> tuple[Path, list[dict]]:
    """Five files of 1000 random bytes, and their rows."""
    folder, rows = tmp_path / "blobs", []
    folder.mkdir()
    for index in range(5):
        content = random.Random(index).randbytes(1000)
        (folder / f"{index}.tar").write_bytes(content)
        rows.append({"file": f"{index}.tar", "bytes": 1000, "sha256": hashlib.sha256(content).hexdigest()})
    return folder, rows


def held(folder: Path) -> set[str]:
    return {path.name.removesuffix(".tar") for path in folder.glob("*.tar")}


def used(folder: Path) -> int:
    """Bytes of everything in the cache; a file that goes meanwhile does not count."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


# Locations


def test_locations_are_paths_or_urls(tmp_path):
    assert location("a/b") == Path("a/b") and location(f"file://{tmp_path}/x") == tmp_path / "x"
    remote = location("s3://bucket/a/shards/")
    assert remote == RemotePath("s3://bucket/a/shards") and remote.name == "shards"
    assert (remote / "x.tar").parent == remote == remote.resolve() and str(remote / "x") == "s3://bucket/a/shards/x"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@example.org/shards", "https://secret@example.org/shards", "sftp://secret@example.org/a/b",
        "https://example.org/shards?X-Amz-Signature=secret", "https://example.org/shards#secret",
        "https://me:se@cret@example.org/shards?secret", "HTTPS://secret:@example.org",
        "simplecache::https://me:secret@example.org/shards", "abfs://me:secret@example.org/shards",
        "https://example.org/sha rds?secret", "https://example.org/it's?secret",
    ],
)  # fmt: skip
def test_what_may_be_secret_in_a_url_is_refused_and_not_repeated(url, tiny, capsys):
    with pytest.raises(ConfigError, match=r"example\.org.*no user name, password, query or fragment") as error:
        location(url)
    assert "secret" not in str(error.value) and "cret@" not in str(error.value)
    assert cli.main(["check", url]) == 2
    for option in ("--data.shards", "--data.cache", "--train.evaluate_shards", "--init_from"):
        assert cli.main(["pretrain", option, url, "--out", tiny.out]) == 2
        assert f"dino-depth: {option[2:]}" in (said := capsys.readouterr().err) and "secret" not in said
    assert cli.main(["prep", "folder", "--root", str(tiny.out), "--roots.visa", url]) == 2
    assert "roots.visa: " in (said := capsys.readouterr().err) and "secret" not in said
    assert not Path(tiny.out).exists()


def test_a_licence_may_hold_a_link():
    words = ["folder", "--folder.licence", "https://creativecommons.org/licenses/by/4.0/?ref=chooser-v1"]
    assert parse(PrepareConfig, words, "prep", ("dataset",)).folder.licence == words[-1]


@pytest.mark.parametrize("command", ["pipe:curl -H secret https://example.org/a", "curl -H secret https://example.org"])
def test_a_command_is_no_place_and_is_not_repeated(command):
    with pytest.raises(ConfigError, match="no command is run to read data") as error:
        location(command)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "shards"], ["pretrain", "--data.shards", "shards"], ["export", "run"], ["evaluate"], ["demo"],
     ["submit", "pretrain", "--data.shards", "shards"], ["submit", "chain"]],
)  # fmt: skip
def test_a_url_to_write_to_becomes_no_local_folder(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--out", "https://me:secret@example.org/x"]) == 2
    error = capsys.readouterr().err
    assert "out is a URL" in error and "secret" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, key",
    [(["pretrain", "--data.shards", "shards", "--data.cache"], "data.cache"),
     (["pretrain", "--data", "{shards: s, cache: 'https://example.org/x'}", "--data.cache"], "data.cache"),
     (["check", "shards", "--cache"], "cache"), (["inspect", "shards", "--cache"], "cache"),
     (["prep", "folder", "--root", "raw", "--out", "memory://x", "--staging"], "staging"),
     (["evaluate", "--encoder.cache"], "encoder.cache"), (["evaluate", "--head.cache"], "head.cache")],
)  # fmt: skip
@pytest.mark.parametrize("url", ["https://example.org/x", "s3://bucket/x", "file:///x"])
def test_a_url_for_any_folder_that_is_written_to_becomes_no_local_folder(
    arguments, key, url, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, url]) == 2
    assert capsys.readouterr().err.startswith(f"dino-depth: {key} is a URL, and must be a local folder")
    assert not list(tmp_path.iterdir())


def test_a_url_in_the_environment_becomes_no_cache_folder(monkeypatch):
    monkeypatch.setenv("DINO_DEPTH_CACHE", "https://example.org/x")
    with pytest.raises(ConfigError, match="^DINO_DEPTH_CACHE is a URL"):
        ShardCache()


def test_places_that_only_look_like_secrets_stay():
    for url in (
        "hf://datasets/you/shards@main", "abfs://box@account.dfs.core.windows.net/a", "s3://bucket/a@b/c:1",
        "http://localhost:8000/a", "memory://o",
    ):  # fmt: skip
        assert str(location(url)) == url == redacted(url)
    for encoder in ("transformers:/models/dinov2?depth_as=max", "random:/models/a?seed=1", "point-mae:/b.pth?x=1"):
        assert redacted(encoder) == encoder


def test_secrets_are_taken_out_of_any_text():
    assert redacted(str(Path("https://me:word@a.org/x?word"))) == "https:/***@a.org/x?***"
    assert redacted(str(Path("https://a.org/x?word"))) == "https:/a.org/x?***"
    assert redacted(str(Path("s3://me:word@b/x"))) == "s3:/***@b/x"
    text = "GET 'https://me:word@a.org:80/x?key=word', then s3://b/c#word and (sftp://word@d) for a@b.org?"
    assert redacted(text) == "GET 'https://***@a.org:80/x?***', then s3://b/c#*** and (sftp://***@d) for a@b.org?"


def test_a_store_that_repeats_a_signature_in_its_error_does_not_publish_it(monkeypatch):
    def refuse(*_):
        raise PermissionError("403 for https://cdn.example.org/a?Signature=word")

    monkeypatch.setattr("dino_depth.storage._filesystem", refuse)
    with pytest.raises(ReportedError, match=r"^s3://b/c: 403 for https://cdn.example.org/a\?\*\*\*$"):
        location("s3://b/c").read_bytes()


def test_a_run_folder_notes_its_command_without_secrets(tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dino-depth", "pretrain", "--data.cache", "s3://me:word@b.org/c?key=word"])
    RunFolder(tiny, DepthShards.configured(tiny.data)).close()
    text = Path(tiny.out, "env.json").read_text()
    assert json.loads(text)["command"] == "dino-depth pretrain --data.cache s3://***@b.org/c?***" and "word" not in text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"^gs://b/x: gs:// needs the package gcsfs: pip install gcsfs$"):
        location("gs://b/x").read_bytes()


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(ConfigError, match=r"^htp://b/x/manifest.json: unknown protocol 'htp'; did you mean 'http'\?$"):
        DepthShards("htp://b/x")


def test_hub_locations_reach_the_hubs_own_file_system():
    files, path = storage._filesystem("hf://datasets/you/depth-shards/manifest.json")
    assert type(files).__name__ == "HfFileSystem" and path == "datasets/you/depth-shards/manifest.json"


# The cache


def test_a_shard_is_fetched_once_and_then_local(blobs, serve, tmp_path):
    folder, rows = blobs
    server, cache = serve(folder), ShardCache(tmp_path / "c", 1)
    for _ in range(3):
        for row in rows:
            with cache.open(RemotePath(server.url) / row["file"], row) as file:
                assert file.read() == (folder / row["file"]).read_bytes()
    assert server.count() == 5 and held(tmp_path / "c") == {row["sha256"] for row in rows}
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == ["", *[".tar"] * 5]


def test_the_least_recently_opened_goes_and_the_limit_holds_after_every_access(blobs, tmp_path):
    """Against a list that is kept by hand."""
    folder, rows = blobs
    for row in rows:
        MemoryFileSystem().pipe(f"/d/{row['file']}", (folder / row["file"]).read_bytes())
    cache, recent, fetched = ShardCache(tmp_path / "c", 3000 / GIB), [], 0
    get = RemotePath.get
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "get", lambda self, local: (counts.update([self.name]), get(self, local)))
        for row in random.Random(0).choices(rows, k=80):
            with cache.open(RemotePath("memory://d") / row["file"], row) as file:
                assert hashlib.sha256(file.read()).hexdigest() == row["sha256"]
            fetched += row["sha256"] not in recent
            recent = [*(sha256 for sha256 in recent if sha256 != row["sha256"]), row["sha256"]][-3:]
            assert held(tmp_path / "c") == set(recent) and used(tmp_path / "c") <= 3000
    assert fetched == counts.total() > 20


def test_threads_that_want_more_than_the_cache_take_turns(blobs, serve, tmp_path):
    """Room for one shard, four at once: all are served, and a watcher never sees more than one."""
    folder, rows = blobs
    server, cache, most, done = serve(folder), ShardCache(tmp_path / "c", 1000 / GIB), [0], threading.Event()
    (tmp_path / "c").mkdir()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], used(tmp_path / "c"))

    failures = []

    def read(seed):
        try:
            for row in random.Random(seed).choices(rows, k=6):
                with cache.open(RemotePath(server.url) / row["file"], row) as file:
                    assert hashlib.sha256(file.read()).hexdigest() == row["sha256"]
        except BaseException as error:
            failures.append(error)

    watcher = threading.Thread(target=watch)
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in (watcher, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    watcher.join()
    assert not failures and 0 < most[0] <= 1000 and not list((tmp_path / "c").glob("*.lock"))


READ_ALL = """
import hashlib, json, sys
from dino_depth.shard_index import INDEX
from dino_depth.storage import RemotePath, ShardCache

print("ready", flush=True)
sys.stdin.readline()
for row in json.loads(sys.argv[3]):
    with ShardCache(sys.argv[2], 1).open(RemotePath(sys.argv[1]) / row["file"], row) as file:
        assert hashlib.sha256(file.read()).hexdigest() == row["sha256"]
"""


def test_processes_that_want_the_same_shard_download_it_once(blobs, serve, tmp_path):
    folder, rows = blobs
    server = serve(folder)
    server.fault = lambda handler: time.sleep(0.1) or False
    command = [sys.executable, "-c", READ_ALL, server.url, str(tmp_path / "c"), json.dumps(rows)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {"PYTHONPATH": str(REPOSITORY)}}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert Counter(server.gets) == {f"/{row['file']}": 1 for row in rows}


def test_what_a_killed_download_left_is_cleared(blobs, serve, tmp_path):
    folder, rows = blobs
    code = "import sys, json; from dino_depth.storage import *; row = json.loads(sys.argv[3]); "
    code += "ShardCache(sys.argv[2], 1500 / 2**30).open(RemotePath(sys.argv[1]) / row['file'], row)"
    server = serve(folder)
    server.fault = first_times(1, "0.tar", lambda handler: (handler.send(b"x" * 500, length=1000), time.sleep(60)))
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(tmp_path / "c"), json.dumps(rows[0])],
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    while not list((tmp_path / "c").glob("*.part")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list((tmp_path / "c").glob("*.lock"))) == 1
    # Another shard needs the room that the dead process had reserved.
    with ShardCache(tmp_path / "c", 1500 / GIB).open(RemotePath(server.url) / "1.tar", rows[1]):
        pass
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"lock", f"{rows[1]['sha256']}.tar"}


def test_a_copy_that_was_cut_short_is_fetched_again(blobs, serve, tmp_path):
    folder, rows = blobs
    server, cache = serve(folder), ShardCache(tmp_path / "c", 1)
    for _ in range(2):
        with cache.open(RemotePath(server.url) / "0.tar", rows[0]) as file:
            assert len(file.read()) == 1000
        os.truncate(tmp_path / "c" / f"{rows[0]['sha256']}.tar", 10)
    assert server.count() == 2


def test_a_shard_larger_than_the_cache_is_one_line(blobs, tmp_path):
    with pytest.raises(ConfigError, match=r"memory://d/0.tar: .* GiB in one shard, cache_gib is .*: raise it"):
        ShardCache(tmp_path / "c", 999 / GIB).open(RemotePath("memory://d/0.tar"), blobs[1][0])
    with pytest.raises(ConfigError, match="cache_gib must be above 0, got 0"):
        ShardCache(tmp_path / "c", 0)


def test_a_name_from_a_manifest_cannot_leave_the_cache(tmp_path):
    with pytest.raises(DataError, match="the manifest says sha256 '../../x'"):
        ShardCache(tmp_path).open(RemotePath("memory://d/0.tar"), {"file": "0.tar", "bytes": 1, "sha256": "../../x"})


FULL_DISK = """
import json, resource, signal, sys
from dino_depth.errors import ReportedError
from dino_depth.shard_index import INDEX
from dino_depth.storage import RemotePath, ShardCache

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
row = json.loads(sys.argv[3])
try:
    ShardCache(sys.argv[2], 1).open(RemotePath(sys.argv[1]) / row["file"], row)
except ReportedError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(blobs, serve, tmp_path):
    folder, rows = blobs
    command = [sys.executable, "-c", FULL_DISK, serve(folder).url, str(tmp_path / "c"), json.dumps(rows[0])]
    said = subprocess.run(command, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True).stdout
    assert re.fullmatch(
        r"cache .*/c: File too large \(http://.*/0.tar, 0.0 MiB\): free some space, lower cache_gib, or .*\n", said
    )
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_made_is_one_line(blobs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportedError, match="cache .*/file/c: Not a directory"):
        ShardCache(tmp_path / "file" / "c").open(RemotePath("memory://d/0.tar"), blobs[1][0])


# The network's faults


def _open(server: Server, rows: list[dict], tmp_path: Path) -> bytes:
    with ShardCache(tmp_path / "c", 1).open(RemotePath(server.url) / "0.tar", rows[0]) as file:
        return file.read()


def _stall(handler):
    handler.send(b"x" * 10, length=1000)
    time.sleep(60)


PASSING = {
    "errors": (2, lambda handler: handler.send(b"", 500)),
    "busy": (1, lambda handler: handler.send(b"", 429)),
    "stall": (1, _stall),
    "hang up": (1, lambda handler: handler.send(b"x" * 10, length=1000)),
    "damage": (1, lambda handler: handler.send(bytes(1000))),
    "too much": (1, lambda handler: handler.send(bytes(1001))),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(blobs, serve, tmp_path, monkeypatch, name):
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.3)
    folder, rows = blobs
    server, start = serve(folder), time.monotonic()
    server.fault = first_times(PASSING[name][0], "0.tar", PASSING[name][1])
    assert _open(server, rows, tmp_path) == (folder / "0.tar").read_bytes()
    assert server.count() == 1 + PASSING[name][0] and held(tmp_path / "c") == {rows[0]["sha256"]}
    assert time.monotonic() - start < 30


LASTING = {
    "errors": (lambda handler: handler.send(b"", 503), ReportedError, "http://.*/0.tar: 503, ", 4),
    "forbidden": (lambda handler: handler.send(b"", 403), ReportedError, "http://.*/0.tar: 403, ", 1),
    "missing": (lambda handler: handler.send(b"", 404), DataError, "http://.*/0.tar: the shard is missing", 1),
    "damage": (lambda handler: handler.send(bytes(1000)), DataError, "http://.*/0.tar: its sha256 differs from the", 2),
    "short": (lambda handler: handler.send(bytes(999)), DataError, "0.tar: 999 bytes, the manifest says 1000", 2),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_one_line_that_names_the_url(blobs, serve, tmp_path, name):
    answer, kind, message, requests = LASTING[name]
    server = serve(blobs[0])
    server.fault = first_times(99, "0.tar", answer)
    with pytest.raises(kind, match=message) as error:
        _open(server, blobs[1], tmp_path)
    assert type(error.value) is kind and "\n" not in str(error.value) and server.count() == requests
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["lock"]


def test_a_file_of_another_size_is_not_even_fetched(blobs, serve, tmp_path):
    server = serve(blobs[0])
    (blobs[0] / "0.tar").write_bytes(bytes(5000))
    with pytest.raises(DataError, match="0.tar: 5000 bytes, the manifest says 1000"):
        _open(server, blobs[1], tmp_path)
    assert server.count() == 0


def test_no_server_is_one_line(tmp_path):
    with pytest.raises(ReportedError, match=r"http://127.0.0.1:9/x/manifest.json: .*"):
        DepthShards("http://127.0.0.1:9/x")


# Reading shards


def fill_memory(folder: Path, where: str) -> str:
    for path in folder.iterdir():
        MemoryFileSystem().pipe(f"/{where}/{path.name}", path.read_bytes())
    return f"memory://{where}"


def test_samples_are_those_of_the_local_folder_also_from_a_cache_that_is_too_small(shards, tmp_path, capfd):
    local, url = DepthShards(str(shards), ["train"]), fill_memory(shards, "d")
    largest = max(row["bytes"] for row in local.manifests[0]["shards"])
    for limit, said in ((10 * largest, 0), (largest, 1)):
        remote = DepthShards([url], ["train"], ShardCache(tmp_path / str(limit), limit / GIB))
        assert capfd.readouterr().err.count("again and again") == said
        assert [*map(remote.key, range(len(local)))] == [*map(local.key, range(len(local)))]
        for index in random.Random(1).choices(range(len(local)), k=12):
            assert remote.png(index) == local.png(index) and used(remote.cache.folder) <= limit
            assert np.array_equal(remote.sample(index)[0].depth, local.sample(index)[0].depth)
            assert remote.description(index) == local.description(index)


def test_both_sizes_are_said(shards, tmp_path, capfd):
    url = fill_memory(shards, "d")
    total = sum(path.stat().st_size for path in shards.glob("*.tar")) / GIB
    limit = max(path.stat().st_size for path in shards.glob("*.tar")) / GIB
    DepthShards(url, cache=ShardCache(tmp_path / "c", limit))
    assert f"the remote shards have {total:.3g} GiB, cache_gib is {limit:.3g}: " in capfd.readouterr().err


@pytest.mark.parametrize("window", [0, 1])
def test_windows_fetch_every_shard_once_an_epoch(shards, tmp_path, monkeypatch, capfd, window):
    rows = json.loads((shards / "manifest.json").read_text())["shards"]
    room = 2 * max(row["bytes"] for row in rows) + (shards / INDEX).stat().st_size
    fetched, get = [], RemotePath.get
    monkeypatch.setattr(RemotePath, "get", lambda self, local: (fetched.append(self.name), get(self, local)))
    remote = DepthShards(fill_memory(shards, "d"), cache=ShardCache(tmp_path / "c", room / GIB), window=window)
    assert fetched == [INDEX], "a shard was fetched before one of its maps was read"
    order = EndlessOrder(remote, DataConfig(window=window), 0)
    keys = {remote.sample(order[position])[1]["key"] for position in range(len(remote))}
    assert len(keys) == 84 and used(remote.cache.folder) <= room
    said = capfd.readouterr().err
    if window:
        assert sorted(fetched) == sorted([INDEX, *(row["file"] for row in rows)]) and not said
        DepthShards(fill_memory(shards, "d"), cache=ShardCache(tmp_path / "c", room / GIB / 3), window=window)
        assert "two windows of remote shards have" in (said := capfd.readouterr().err) and "lower data.window" in said
    else:
        assert len(fetched) > 20 and "data.window reads them in turn" in said


def test_local_folders_are_neither_copied_nor_hashed(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardCache, "open", lambda *_: pytest.fail("the cache is for URLs"))
    DepthShards(str(shards)).sample(0)
    assert len(DepthShards(f"file://{shards}")) == len(DepthShards(str(shards)))
    assert not (tmp_path / "cache").exists()


def test_the_cache_of_a_run_is_its_setting(shards, tmp_path, tiny):
    tiny.data.shards, tiny.data.cache, tiny.data.cache_gib = fill_memory(shards, "d"), str(tmp_path / "mine"), 0.5
    opened = DepthShards.configured(tiny.data)
    index = opened.manifests[0]["index"]["sha256"]
    assert held(tmp_path / "mine") == {index}, "a shard was fetched before anybody read a map"
    for number in range(len(opened)):
        opened.sample(number)
    assert (opened.cache.folder, opened.cache.limit) == (tmp_path / "mine", GIB // 2)
    assert held(tmp_path / "mine") == {index, *(row["sha256"] for row in opened.manifests[0]["shards"])}


def test_a_folder_that_is_not_there_is_one_line(serve, tmp_path):
    (tmp_path / "site" / "a").mkdir(parents=True)
    url = serve(tmp_path / "site").url
    for place in (f"{url}/a", "memory://nowhere"):
        with pytest.raises(DataError, match=f"{place} has no manifest.json"):
            DepthShards(place)
        with pytest.raises(DataError, match=f"{place} has no manifest.json"):
            check(CheckConfig(place))
    (tmp_path / "site" / "a" / "manifest.json").write_text('{"version": 2, "shards": [{"file": "x"}]}')
    with pytest.raises(DataError, match=f"{url}/a/manifest.json is not a manifest of dino-depth shards"):
        DepthShards(f"{url}/a")


def test_forked_workers_fetch_for_themselves(shards, serve, tmp_path):
    """Their parent's connections are no use to them."""
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    remote, local = (
        DepthShards(serve(shards).url, cache=ShardCache(tmp_path / "c", largest / GIB)),
        DepthShards(str(shards)),
    )
    order = random.Random(2).choices(range(len(local)), k=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fsspec's thread is what is tested
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(remote.png, order, chunksize=1) == [local.png(index) for index in order]


@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining_from_a_server_is_bit_for_bit_that_from_the_folder(tiny, shards, serve, tmp_path, workers):
    from dino_depth import checkpoint
    from dino_depth.pretrain.train import pretrain
    from tests.test_pretrain import assert_same

    server = serve(shards)
    states = []
    for name, source in (("local", str(shards)), ("remote", server.url)):
        tiny.out, tiny.data.shards, tiny.data.workers, tiny.train.steps = str(tmp_path / name), source, workers, 4
        pretrain(tiny)
        states.append(checkpoint.load(checkpoint.checkpoints(tmp_path / name)[-1]))
    assert_same(*states)
    assert server.count() == len(list(shards.glob("*.tar")))


# Check


def test_check_reads_every_byte_of_a_url_whatever_is_in_the_cache(shards, serve, tmp_path, capsys):
    site = Path(shutil.copytree(shards, tmp_path / "site"))
    url, first = serve(site).url, sorted(site.glob("*.tar"))[0]
    check(CheckConfig(url))
    assert f"{url} is intact: 84 maps in 4 shards" in capsys.readouterr().out
    content = bytearray(first.read_bytes())
    content[5000] ^= 1
    first.write_bytes(content)
    with pytest.raises(DataError, match=f"{url}/{first.name}: its sha256 differs"):
        check(CheckConfig(url))
    first.unlink()
    with pytest.raises(DataError, match=f"{url}/{first.name}: the shard is missing"):
        check(CheckConfig(url))


def test_check_finds_an_extra_shard_where_the_store_lists(shards):
    url = fill_memory(shards, "d")
    check(CheckConfig(url))
    MemoryFileSystem().pipe("/d/depth-000009.tar", b"")
    with pytest.raises(DataError, match=r"memory://d/depth-000009.tar is not in manifest.json"):
        check(CheckConfig(url))


# Writing


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for index in range(7):
        np.save(root / f"{index}.npy", depth_scene(index, 20))
    return root


def settings_for(raw: Path, out, **values) -> PrepareConfig:
    options = FolderOptions(unit="m")
    return PrepareConfig("folder", str(raw), str(out), 1, samples_per_shard=3, folder=options, **values)


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(settings_for(raw, out))
    return {path.name: path.read_bytes() for path in out.iterdir()}


def in_memory(where: str = "o") -> dict[str, bytes]:
    prefix = f"/{where}/"
    found = {name.removeprefix(prefix): file.getvalue() for name, file in MemoryFileSystem.store.items()}
    return {name: content for name, content in found.items() if not name.startswith("/")}


@pytest.fixture
def uploads(monkeypatch) -> list[str]:
    """The names that are uploaded."""
    names, put = [], RemotePath.put
    monkeypatch.setattr(RemotePath, "put", lambda self, local: (names.append(self.name), put(self, local)))
    return names


def test_what_is_uploaded_equals_the_local_folder_and_nothing_stays(raw, expected, uploads, tmp_path, capsys):
    prepare(settings_for(raw, "memory://o"))
    assert in_memory() == expected and uploads == [*sorted(expected)[:3], "index.safetensors", "manifest.json"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "maps in 3 shards" in (said := capsys.readouterr().out) and "in memory://o" in said
    check(CheckConfig("memory://o"))


def test_a_finished_folder_is_compared_and_left_alone(raw, expected, uploads, tmp_path, capsys):
    prepare(settings_for(raw, "memory://o"))
    del uploads[:]
    assert prepare(settings_for(raw, "memory://o"))["total"] == 7 and uploads == []
    assert "memory://o was finished before and is complete (sizes compared): 7 maps" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="out memory://o was begun differently: config.max_side was 0, now 16"):
        prepare(settings_for(raw, "memory://o", max_side=16))
    MemoryFileSystem().pipe("/o/depth-000001.tar", b"short")
    with pytest.raises(DataError, match="memory://o/depth-000001.tar: 5 bytes, the manifest says"):
        prepare(settings_for(raw, "memory://o"))
    MemoryFileSystem().rm("/o/depth-000001.tar")
    with pytest.raises(DataError, match="memory://o/depth-000001.tar: the shard is missing"):
        prepare(settings_for(raw, "memory://o"))


def test_folders_that_hold_something_else_are_refused(raw, expected, tmp_path):
    for name in ("o/thesis.tex", "o/deeper/thesis.tex", "o/depth-000000.tar"):
        MemoryFileSystem.store.clear()
        MemoryFileSystem().pipe(f"/{name}", b"x")
        with pytest.raises(ConfigError, match=f"out memory://o holds {name.split('/')[1]}, no manifest.json"):
            prepare(settings_for(raw, "memory://o"))
        assert list(MemoryFileSystem.store) == [f"/{name}"]
    MemoryFileSystem.store.clear()
    for name in (".gitattributes", "README.md"):
        MemoryFileSystem().pipe(f"/o/{name}", b"of a new repository")
    prepare(settings_for(raw, "memory://o"))
    assert expected.items() <= in_memory().items()


def test_places_that_cannot_work_are_refused(raw, tmp_path):
    with pytest.raises(ConfigError, match="out https://example.org/x: web servers are read only"):
        prepare(settings_for(raw, "https://example.org/x"))
    with pytest.raises(ConfigError, match="staging s belongs to an out that is a URL; out is "):
        prepare(settings_for(raw, tmp_path / "o", staging="s"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=f"out {tmp_path}/s is not empty and holds no shards"):
        prepare(settings_for(raw, "memory://o", staging=str(tmp_path / "s")))
    assert not MemoryFileSystem.store and [path.name for path in (tmp_path / "s").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("fails", range(4))
def test_a_failed_upload_is_one_line_and_nothing_is_uploaded_twice(raw, expected, uploads, monkeypatch, fails):
    put_file, puts = MemoryFileSystem.put_file, []

    def failing(self, local, path, **options):
        puts.append(path)
        if len(puts) > fails:
            raise ConnectionResetError("connection reset")
        return put_file(self, local, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    with pytest.raises(ReportedError, match="memory://o/.*: connection reset"):
        prepare(settings_for(raw, "memory://o"))
    assert len(puts) == fails + 4 and "manifest.json" not in in_memory()
    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    arrived = uploads[:-1]
    del uploads[:]
    prepare(settings_for(raw, "memory://o"))
    assert in_memory() == expected and not set(uploads) & set(arrived)


def test_an_upload_that_arrived_short_is_noticed(raw, expected, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda self, local, path: self.pipe_file(path, b"half"))
        with pytest.raises(ReportedError, match=r"depth-000000.tar: 4 bytes after an upload of \d+"):
            prepare(settings_for(raw, "memory://o"))
    prepare(settings_for(raw, "memory://o"))
    assert in_memory() == expected


def test_shards_that_vanish_or_are_not_planned_any_more_are_set_right(raw, expected, tmp_path, monkeypatch):
    more = Path(shutil.copytree(raw, tmp_path / "more"))
    for index in range(7, 13):
        np.save(more / f"later{index}.npy", depth_scene(index, 20))

    def stop(*_):
        raise ReportedError("stopped before the manifest")

    monkeypatch.setattr("data_prep.shards.publish", stop)
    with pytest.raises(ReportedError, match="stopped"):
        prepare(settings_for(more, "memory://o"))
    monkeypatch.undo()
    monkeypatch.setenv("DINO_DEPTH_CACHE", str(tmp_path / "cache"))
    assert len(in_memory()) == 5
    MemoryFileSystem().rm("/o/depth-000001.tar")
    for index in range(7, 13):
        (more / f"later{index}.npy").unlink()
    prepare(settings_for(more, "memory://o"))
    assert in_memory() == expected


def test_shares_of_a_plan_are_written_and_finished_apart(raw, expected, tmp_path):
    planned = plan(settings_for(raw, "memory://o", staging=str(tmp_path / "stage")))
    with pytest.raises(
        ConfigError, match="memory://o .staged in .*stage. was not begun.*a folder that all of them see"
    ):
        write_share(planned, planned.tasks[:1])
    with writing(planned.out), exclusive(planned.out, planned.remote) as finished_before:
        assert not finished_before
        begin(planned)
    write_share(planned, planned.tasks[1:])
    with pytest.raises(DataError, match=r"memory://o: 1 of 3 shards are not written \(depth-000000.tar\)"):
        finish(planned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "put", lambda *_: (_ for _ in ()).throw(ReportedError("no network")))
        with pytest.raises(ReportedError, match="no network"):
            write_share(planned, planned.tasks[:1])
    finish(planned)
    assert in_memory() == expected and not (tmp_path / "stage").exists()
    assert finish(planned)["total"] == 7


def test_a_shard_that_vanishes_before_the_manifest_is_noticed(raw, tmp_path):
    manifest = prepare(settings_for(raw, "memory://o"))
    MemoryFileSystem().rm("/o/manifest.json")
    MemoryFileSystem().rm("/o/depth-000002.tar")
    with pytest.raises(DataError, match=r"memory://o/depth-000002.tar: the shard is missing"):
        publish(tmp_path, RemotePath("memory://o"), manifest, b"")
    assert "manifest.json" not in in_memory()


@pytest.mark.parametrize("cleared", [False, True])
def test_a_remote_folder_that_was_removed_again_is_written_anew(raw, expected, tmp_path, monkeypatch, cleared):
    """Also where a kill, right after the manifest was written, left its note in the staging folder."""

    def publish_and_stop(*arguments):
        publish(*arguments)
        raise ReportedError("killed")

    monkeypatch.setattr("data_prep.shards.publish", publish_and_stop)
    with pytest.raises(ReportedError, match="killed"):
        prepare(settings_for(raw, "memory://o", staging=str(tmp_path / "stage")))
    monkeypatch.setattr("data_prep.shards.publish", publish)
    assert (tmp_path / "stage" / "manifest.json").exists()
    if cleared:
        shutil.rmtree(tmp_path / "stage" / ".progress")
    MemoryFileSystem.store.clear()
    prepare(settings_for(raw, "memory://o", staging=str(tmp_path / "stage")))
    assert in_memory() == expected and not (tmp_path / "stage").exists()


def test_two_runs_on_one_url(raw, tmp_path):
    planned = plan(settings_for(raw, "memory://o"))
    (planned.out / ".progress").mkdir(parents=True)
    with open(planned.out / ".progress" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="out memory://o .staged in .* is being written by another process"):
            prepare(settings_for(raw, "memory://o"))


EVERY_MOMENT = """
import os, shutil, signal, sys
import fsspec
from fsspec.implementations.local import LocalFileSystem
from data_prep.folder import FolderOptions
from data_prep.shards import PrepareConfig, prepare


class Disk(LocalFileSystem):
    "A store that outlives a kill; an upload may be cut short."

    protocol = "disk"

    def __init__(self):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("disk://")

    def put_file(self, local, path, **_):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        content = open(local, "rb").read()
        with open(path, "wb") as file:
            file.write(content[:200])
            file.flush()
            moment()
            file.write(content[200:])
        moment()


def moment():
    global calls
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1


def counted(original):
    return lambda *arguments, **options: (moment(), original(*arguments, **options))[1]


def run(out):
    options = FolderOptions(unit="m")
    prepare(PrepareConfig("folder", sys.argv[1], "disk://" + out, 1, samples_per_shard=3, folder=options))


fsspec.register_implementation("disk", Disk)
calls, last, tried, status = 0, -1, 0, -1
while status != 0:
    out = f"{sys.argv[2]}/{tried:03d}"
    child = os.fork()
    if child == 0:
        calls, last = 0, tried
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        run(out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    run(out)
    tried += 1
"""


def test_killed_before_every_change_of_the_disk_and_within_every_upload(raw, expected, tmp_path):
    environment = {"PYTHONPATH": str(REPOSITORY), "DINO_DEPTH_CACHE": str(tmp_path / "cache")}
    (tmp_path / "outs").mkdir()
    command = [sys.executable, "-c", EVERY_MOMENT, str(raw), str(tmp_path / "outs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outs = sorted((tmp_path / "outs").iterdir())
    assert len(outs) > 40
    for out in outs:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected, out.name
    # Only an empty or forgotten staging folder may be left: never a shard.
    assert not list((tmp_path / "cache").rglob("*.tar"))


# S3's own protocol


class Bucket(Server):
    """As much of S3 as shards need: put, head, get, list and delete of small objects."""

    def __init__(self):
        super().__init__(Path("/nonexistent"))
        self.RequestHandlerClass, self.objects = S3Handler, {}


class S3Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """No line for each request."""

    def _answer(self, content: bytes = b"", status: int = 200, size: int | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(content)

    def _key(self) -> str:
        return self.path.partition("?")[0].removeprefix("/bucket/")

    def do_PUT(self):  # noqa: N802
        self.server.objects[self._key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def do_HEAD(self):  # noqa: N802
        found = self.server.objects.get(self._key())
        self._answer(b"", 404 if found is None else 200, 0 if found is None else len(found))

    def do_GET(self):  # noqa: N802
        if "list-type" not in self.path:
            found = self.server.objects.get(self._key())
            missing = b"<Error><Code>NoSuchKey</Code><Message>missing</Message></Error>"
            self._answer(*((missing, 404) if found is None else (found,)))
            return
        query = dict(part.partition("=")[::2] for part in self.path.partition("?")[2].split("&"))
        prefix = query.get("prefix", "").replace("%2F", "/")
        rows = [
            f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>0</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, content in sorted(self.server.objects.items())
            if key.startswith(prefix)
        ]
        self._answer(f"<ListBucketResult>{''.join(rows)}<IsTruncated>false</IsTruncated></ListBucketResult>".encode())

    def do_DELETE(self):  # noqa: N802
        self.server.objects.pop(self._key(), None)
        self._answer(b"", 204)


def test_shards_go_to_s3_from_two_workers_and_come_back(raw, expected, tmp_path, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    server = Bucket()
    settings = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    settings |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    settings |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        config = settings_for(raw, "s3://bucket/x/shards")
        config.workers = 2
        prepare(config)
        assert server.objects == {f"x/shards/{name}": content for name, content in expected.items()}
        prepare(config)
        check(CheckConfig("s3://bucket/x/shards"))
        assert len(DepthShards("s3://bucket/x/shards")) == 7
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
