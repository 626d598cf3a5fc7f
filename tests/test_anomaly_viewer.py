"""The viewer of the report in headless Chromium: offline, without complaint, every cube where it is."""

import asyncio
import base64
import io
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from anomaly_run import edit, make_run
from PIL import Image
from scipy.spatial import Delaunay

from dino_depth.anomaly.packing import turn
from dino_depth.anomaly.report import ReportConfig, report
from dino_depth.anomaly.strips import read_arrays

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, its results and its page."""
    run = tmp_path_factory.mktemp("runs") / "ladder"
    run.mkdir()
    results = make_run(run)
    report(ReportConfig(str(run)))
    return run, results, (run / "report.html").read_text(encoding="utf-8")


class Page:
    """A page in headless Chromium, through the DevTools protocol; keeps its requests and complaints."""

    def __init__(self, socket):
        self.socket, self.sent, self.events = socket, 0, []

    async def call(self, method: str, **parameters) -> dict:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def value(self, expression: str):
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def pixels(self) -> np.ndarray:
        await self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = await self.value("document.querySelector('canvas').toDataURL()")
        return np.array(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)

    def complaints(self) -> list:
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in wrong]

    def requests(self) -> set[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith("data:")}


def browse(page: Path, profile: Path, visit, flags: tuple[str, ...] = ()):
    """Runs ``visit(Page)`` in a browser that shows ``page`` and can reach no network."""
    aiohttp = pytest.importorskip("aiohttp")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
        "--remote-debugging-port=0", "--window-size=1000,1400", *flags, "about:blank",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    async def main():
        port, end = profile / "DevToolsActivePort", time.monotonic() + 60
        while not port.exists() or len(port.read_text().splitlines()) < 2:
            assert time.monotonic() < end and browser.poll() is None, "the browser does not start"
            await asyncio.sleep(0.1)
        number = port.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{number}/json") as answer:
                (tab,) = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                shown = Page(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await shown.call(f"{domain}.enable")
                await shown.call("Page.navigate", url=page.as_uri())
                while await shown.value("document.readyState") != "complete":
                    await asyncio.sleep(0.1)
                await visit(shown)

    try:
        asyncio.run(main())
    finally:
        browser.send_signal(signal.SIGTERM)
        browser.wait(20)


async def drag(shown: Page, dx: int, dy: int):
    box = json.loads(await shown.value("JSON.stringify(document.querySelector('canvas').getBoundingClientRect())"))
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    for kind, place, buttons in (("mousePressed", 0, 1), ("mouseMoved", 1, 1), ("mouseReleased", 1, 0)):
        await shown.call("Input.dispatchMouseEvent", type=kind, x=x + place * dx, y=y + place * dy, button="left",
                         buttons=buttons, clickCount=1)  # fmt: skip


async def touch(shown: Page, start: list[tuple], end: list[tuple]):
    box = json.loads(await shown.value("JSON.stringify(document.querySelector('canvas').getBoundingClientRect())"))
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    for kind, places in (("touchStart", start), ("touchMove", end), ("touchEnd", [])):
        points = [{"x": x + dx, "y": y + dy, "id": number} for number, (dx, dy) in enumerate(places)]
        await shown.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_volume_turns_zooms_and_is_thresholded_in_a_browser(finished, tmp_path):
    run, _, page = finished

    async def visit(shown: Page):
        await shown.value("document.querySelector('canvas').scrollIntoView()")
        first = await shown.pixels()
        assert await shown.value("document.querySelector('canvas').getContext('webgl') !== null")
        pane = (first == [27, 30, 34]).all(-1)
        half = first.shape[1] // 2
        assert 0.05 < 1 - pane[:, :half].mean() < 0.9 and 0.05 < 1 - pane[:, half:].mean() < 0.9
        about = json.loads(await shown.value("document.getElementById('volume-0').dataset.about"))
        content = base64.b64decode(await shown.value("document.getElementById('volume-0').textContent"))
        level = np.frombuffer(content, np.uint8, about["observed"], 6 * about["voxels"])
        assert await shown.value("volumeViewer.state.drawn") == np.count_nonzero(level >= about["threshold"])

        await drag(shown, 60, 0)
        turned = await shown.pixels()
        assert (turned != first).any(-1).mean() > 0.02
        assert await shown.value("volumeViewer.state.yaw") == pytest.approx(0)
        await drag(shown, -60, 0)
        assert np.array_equal(await shown.pixels(), first)

        for name, value in (("threshold", 0), ("threshold", 200), ("threshold", 255)):
            await shown.value(f"""(() => {{ const slider = document.querySelector('[name={name}]');
                slider.value = {value}; slider.dispatchEvent(new Event('input')); }})()""")
            await shown.pixels()
            assert await shown.value("volumeViewer.state.drawn") == np.count_nonzero(level >= value)
            said = await shown.value("document.querySelector('output').textContent")
            assert f"{np.count_nonzero(level >= value):,} of {about['observed']:,} voxels" in said
        await shown.value("volumeViewer.set({threshold: 255, zoom: 0.5})")
        small = (await shown.pixels() != [27, 30, 34]).any(-1).mean()
        assert small == pytest.approx((1 - pane.mean()) / 4, rel=0.15)

        await touch(shown, [(0, 0)], [(30, 0)])
        assert await shown.value("volumeViewer.state.yaw") == pytest.approx(0.3)
        await touch(shown, [(-20, 0), (20, 0)], [(-60, 0), (60, 0)])
        assert await shown.value("volumeViewer.state.zoom") == pytest.approx(1.5)

        await shown.value("document.querySelector('[data-volume=\"2\"] .still').click()")
        await shown.pixels()
        assert await shown.value("volumeViewer.state.volume") == 2
        assert await shown.value("document.querySelectorAll('.still[hidden]').length") == 1
        assert await shown.value("document.querySelector('[data-volume=\"2\"] canvas') !== null")
        assert shown.complaints() == [] and shown.requests() == {(run / "report.html").as_uri()}

    browse(run / "report.html", tmp_path / "profile", visit)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_cubes_are_drawn_where_they_are_and_hide_what_is_behind(tmp_path, finished):
    """A single cube seen from the front is a square; of two in line the near one is seen."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    path = run / "predictions" / "plate" / "seed0" / "02_bad.npz"
    arrays = read_arrays(path)
    # From -y: the first hides the second and third, the last stands to the right. The scale is 0.25 to 1.
    arrays["index"] = np.array([[0, 0, 0], [0, 1, 0], [0, 3, 0], [3, 0, 0]], np.int32)
    arrays["score"], arrays["truth_index"] = np.array([0.0, -1, 1, 0.5]), np.array([[0, 3, 0]], np.int32)
    np.savez(path, **arrays)
    edit(run, lambda results: [results["categories"].pop(), results["trials"][0].update(
        instances=[row for row in results["trials"][0]["instances"] if row["name"] == "02_bad"]),
        results.update(trials=results["trials"][:1])])  # fmt: skip
    report(ReportConfig(str(run)))

    async def visit(shown: Page):
        await shown.value("volumeViewer.set({yaw: 0, pitch: 0, object: 'solid', threshold: 1})")
        picture = await shown.pixels()
        height, half = picture.shape[0], picture.shape[1] // 2
        step = min(half, height) / np.sqrt(4 * 4 + 4 * 4 + 1)

        def at(pane: int, x: float, z: float) -> np.ndarray:
            return picture[int(height / 2 - z * step), int(half / 2 + pane * half + (x - 1.5) * step)]

        light = 0.5 + 0.5 * 0.81  # of a face towards the viewer
        plain, middle = light * np.array([150, 156, 162]), light * np.array([49, 104, 142])
        for pane in (0, 1):
            for x, z in ((0, 0), (-0.45, 0.45), (0.45, -0.45)):
                assert np.abs(at(pane, x, z) - plain).max() < 3
            for x, z in ((0.6, 0), (1.5, 0), (0, 0.6), (3.6, 0)):
                assert at(pane, x, z).tolist() == [27, 30, 34]
        assert np.abs(at(0, 3, 0) - middle).max() < 3 and np.abs(at(1, 3, 0) - plain).max() < 3
        await shown.value("volumeViewer.set({object: 'through'})")
        picture = await shown.pixels()
        assert np.abs(at(0, 0, 0) - light * np.array([253, 231, 37])).max() < 3
        assert np.abs(at(1, 0, 0) - light * np.array([255, 138, 101])).max() < 3
        await shown.value("volumeViewer.set({object: 'hidden', threshold: 200, yaw: Math.PI})")
        picture = await shown.pixels()
        # From the other side the third is in front, and right is left.
        assert np.abs(at(0, 3, 0) - light * np.array([253, 231, 37])).max() < 3 and at(0, 0, 0).tolist() == [27, 30, 34]

        await shown.value("volumeViewer.set({yaw: 0.5, pitch: 0.4})")
        picture, axes = await shown.pixels(), turn(0.5, 0.4)
        corners = (np.stack(np.meshgrid(*3 * [[-0.5, 0.5]]), -1).reshape(8, 3) + [0, 3, 0] - [1.5, 1.5, 0]) @ axes.T
        for normal in (*np.eye(3), *-np.eye(3)):
            right, up, _ = axes @ ([0, 3, 0] - np.array([1.5, 1.5, 0]) + normal / 2)
            facing = axes @ normal
            if facing[2] > 0:
                shade = 0.5 + 0.5 * max(facing @ [0.3, 0.5, 0.81], 0)
                assert np.abs(at(0, 1.5 + right, up) - shade * np.array([253, 231, 37])).max() < 3
        middle, hull = corners[:, :2].mean(0), Delaunay(corners[:, :2])
        for away in np.random.default_rng(0).uniform(-0.9, 0.9, (300, 2)):
            narrow, wide = (hull.find_simplex(middle + away / reach) >= 0 for reach in (0.94, 1.06))
            if narrow == wide:  # else too close to the cube's outline
                right, up = middle + away
                assert (at(0, 1.5 + right, up).tolist() != [27, 30, 34]) == wide

    browse(run / "report.html", tmp_path / "profile", visit)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_without_webgl_there_are_stills(finished, tmp_path):
    async def visit(shown: Page):
        assert await shown.value("document.getElementById('no-webgl').hidden") is False
        assert await shown.value("document.getElementById('viewer').hidden") is True
        assert await shown.value("[...document.querySelectorAll('.still img')].every(image => image.naturalWidth > 0)")
        assert not [event for event in shown.complaints() if event["method"] != "Log.entryAdded"]

    browse(finished[0] / "report.html", tmp_path / "profile", visit, flags=("--disable-3d-apis",))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_page_is_as_wide_as_the_screen(finished, tmp_path, width):
    async def visit(shown: Page):
        await shown.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        assert await shown.value("document.documentElement.scrollWidth") <= width
        assert await shown.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")

    browse(finished[0] / "report.html", tmp_path / "profile", visit)
