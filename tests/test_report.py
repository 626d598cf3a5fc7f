"""The report page: every number from the files, self-contained, well-formed, and complete as far as the run is."""

import base64
import html.parser
import io
import json
import math
import re
import shutil

import pytest
from PIL import Image
from test_probe import make_run, write_shards

from dino_depth.config import PretrainConfig
from dino_depth.errors import ConfigError, DataError
from dino_depth.pretrain.in_loop import find_best
from dino_depth.probing.figures import FIGURES
from dino_depth.probing.probe import ProbeConfig, probe
from dino_depth.publish.report import Chart, charts, evaluation_charts, read_metrics, write_report

CATEGORIES = ("bump", "dent", "tilt", "<b>&bold")
PARITY = {
    "passed": True,
    "tolerance": 1e-5,
    "samples": 4,
    "pairs": {
        "training - timm": {
            "class": {"max_abs": 1.2e-6, "mean_abs": 1e-7},
            "patch": {"max_abs": None, "mean_abs": None},
        }
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with metrics and environment, its shards and its probe."""
    root = tmp_path_factory.mktemp("report")
    folder = write_shards(root / "shards", categories=CATEGORIES, maps=4)
    run = make_run(root / "run", folder)
    rows = [
        {"step": step, "loss": 9.0 - step, "loss/dino": 7.0, "health/class_used": 0.25 * step} for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "env.json").write_text(json.dumps({"samples": 16, "packages": {"torch": "9.8.7"}, "gpu": None}))
    return run, folder, probe(ProbeConfig(str(run), folder, bootstrap=20, device="cpu"))


class Checker(html.parser.HTMLParser):
    """Every opened element is closed in order; collects what a reader sees and what a browser would load."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.sources, self.tags, self.words = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            raise AssertionError(f"</{tag}> closes {self.open[-1:]}")
        self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_complete_and_needs_nothing_else(finished, tmp_path):
    run, folder, probed = finished
    results = {
        "probe": probed,
        "parity": PARITY,
        "gate": {"passed": False, "failures": ["kNN gains <nothing>"]},
        "seconds": {"pretrain": 61.5, "probe": 240.0},
    }
    write_report(run, results, folder, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Checker(source)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in source and "url(" not in source
    assert page.sources and all(value.startswith("data:image/png;base64,") for value in page.sources)
    for value in page.sources:
        with Image.open(io.BytesIO(base64.b64decode(value.split(",")[1]))) as image:
            assert image.mode in ("RGB", "P") and min(image.size) >= 28
    # 6 maps with their 2 global and 4 local crops; depth, trained and random colours of 12 maps.
    assert len(page.sources) == 6 * 7 + 12 * 3
    gain, curvature = probed["figures"]["knn_class"]["gain"], probed["figures"]["curvature"]
    for expected in (
        "3 of 125,000 steps of 128 maps in 62 s", "on 16 depth maps", "Gate failed.", "kNN gains <nothing>",
        "16 query maps that training never saw", f"{gain['value']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}",
        f"{curvature['pixels']['value']:.3f}", "<b>&bold", "1.2e-06", "not finite", "within 1e-05", "4.0 min",
        "torch 9.8.7", "initialization: xavier", "gate: above", "log K",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_what_a_run_lacks_is_left_out(finished, tmp_path):
    run, folder, _ = finished
    write_report(run, {}, folder, tmp_path / "report.html")
    text = Checker((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "How it learned" in text and "What the network sees" in text
    assert "Gate" not in text and "What the features know" not in text and "Export" not in text


def test_the_same_run_gives_the_same_page(finished, tmp_path):
    run, folder, probed = finished
    for name in ("a.html", "b.html"):
        write_report(run, {"probe": probed, "gate": {"passed": True, "failures": []}}, folder, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "Gate passed. kNN on the class feature gains" in Checker((tmp_path / "a.html").read_text()).text


def test_no_run_no_page(tmp_path):
    folder = write_shards(tmp_path / "shards", maps=2)
    with pytest.raises(ConfigError):
        write_report(tmp_path / "none", {}, folder, tmp_path / "report.html")
    run = make_run(tmp_path / "run", folder)
    with pytest.raises(DataError, match="metrics.jsonl"):
        write_report(run, {}, folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_metrics_of_a_killed_run_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_curves_lie_where_their_values_are():
    config = PretrainConfig()
    values = [3.0, 1.0, math.nan, 2.0]
    rows = [{"step": 10 * (place + 1), "loss/dino": value} for place, value in enumerate(values)]
    rows.append({"step": 50, "note": "text"})
    groups = charts(rows, config)
    assert list(groups) == ["loss"]
    chart = groups["loss"][0]
    log_k = math.log(config.loss.prototypes)
    margin = 0.06 * (log_k - 1)
    low, high = 1 - margin, log_k + margin

    def y(value):
        return Chart.HEIGHT * (high - value) / (high - low)

    pieces = re.findall(r"([ML])([\d.]+) ([\d.]+)", chart.path)
    assert [piece[0] for piece in pieces] == ["M", "L", "M", "L"]  # broken at the NaN; the last point is drawn twice
    expected = [(0, 3.0), (Chart.WIDTH / 3, 1.0), (Chart.WIDTH, 2.0), (Chart.WIDTH, 2.0)]
    for (_, horizontal, vertical), (x, value) in zip(pieces, expected, strict=True):
        assert float(horizontal) == pytest.approx(x, abs=0.1) and float(vertical) == pytest.approx(y(value), abs=0.1)
    ((height, text),) = chart.references
    assert text == "log K" and height == pytest.approx(y(log_k), abs=0.1)
    assert chart.last == "2" and (chart.first_step, chart.last_step) == (10, 40)


def test_long_runs_are_thinned_to_their_ends():
    rows = [{"step": step, "lr": step / 5000} for step in range(1, 5001)]
    chart = charts(rows, PretrainConfig())["lr"][0]
    assert chart.path.count("L") < 420
    assert chart.path.endswith(f"{float(Chart.WIDTH)} {chart.ticks[0][0]}")


def evaluation(**values: float) -> dict:
    named = dict.fromkeys(FIGURES, 0.5) | values
    return {"figures": {name: {"trained": {"value": v, "low": v - 0.1, "high": v + 0.1}} for name, v in named.items()}}


def test_probes_during_training_are_a_curve_with_the_best_marked(finished, tmp_path):
    run, folder, _ = finished
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "evaluations").mkdir()
    curve = {0: 0.1, 10: 0.437, 20: None, 30: 0.2}
    for step, value in curve.items():
        result = {"error": "no features"} if value is None else evaluation(normal=value)
        (copied / "evaluations" / f"step-{step:08d}.json").write_text(json.dumps(result))
    write_report(copied, {}, folder, tmp_path / "report.html")
    page = Checker((tmp_path / "report.html").read_text(encoding="utf-8"))
    for expected in (
        "Held-out maps during training", "at 4 steps", "step 10 (circled) with 0.437, 95 % from 0.337 to 0.537",
        "Best by R² normal, mean", "Without result: step 20", "best step", "kNN, mean patch",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.text.count("best step") == 1


def test_the_best_lies_on_its_curve():
    results = {0: evaluation(curvature=0.1), 10: evaluation(curvature=0.4), 20: {"error": "x"}}
    results |= {40: evaluation(curvature=0.2)}
    drawn = evaluation_charts(results, find_best(results, "curvature"))
    assert [chart.title for chart in drawn] == [title.replace("R2", "R²") for title in FIGURES.values()]
    chart = drawn[list(FIGURES).index("curvature")]
    height = Chart.HEIGHT * 0.06 / 1.12  # of the largest value: a margin of 6 % of the span either way
    assert chart.mark == pytest.approx((Chart.WIDTH / 4, height), abs=0.1)
    assert f"L{chart.mark[0]} {chart.mark[1]}L" in chart.path
    assert all(other.mark is None for other in drawn if other is not chart)
    assert evaluation_charts({}, None) == evaluation_charts({5: {"error": "x"}}, None) == []
