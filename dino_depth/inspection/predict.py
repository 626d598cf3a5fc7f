"""``dino-depth predict MODEL SCANS --out OUT``: a decision for every scan in a folder, or for every one that arrives.

    OUT/<scan>/result.json     score, threshold, decision, defects, seconds
    OUT/<scan>/volume.ply      scores in the part's frame, millimetres, for CloudCompare
    OUT/<scan>/page.html       the volume to turn, the views with their maps, the defects
    OUT/results.csv            a line for each scan, written when its folder is whole
    OUT/rejected/<scan>/       with ``watch``: a scan that cannot be read, moved here, and reason.txt

A scan whose folder is in OUT is not inspected again. A folder appears in one step, so a kill leaves none half written.
"""

import csv
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.tree import refuse_link_out
from dino_depth.anomaly.dataset import Sample, held
from dino_depth.anomaly.results import write_ply
from dino_depth.errors import ConfigError, DataError, Interrupted
from dino_depth.inspection.inspector import Inspection, Inspector
from dino_depth.inspection.model_folder import MODEL
from dino_depth.inspection.page import write_inspection_page
from dino_depth.inspection.parts import instance_folders, read_instance
from dino_depth.lock import EXCLUSIVE, locked
from dino_depth.progress import Progress
from dino_depth.terminal import say

__all__ = ["PredictConfig", "predict"]

RESULT, TABLE, REJECTED = "result.json", "results.csv", "rejected"
COLUMNS = ("scan", "decision", "score", "threshold", "defects", "largest_defect_mm", "deviation_mm", "seconds")
DECISIONS = {True: "anomalous", False: "good", None: "undecided"}


@dataclass
class PredictConfig:
    """Inspect scans with a model.

    Attributes:
        model: folder of the model.
        scans: folder of scans, of the form of the parts the model was fitted on.
        out: folder of the results.
        watch: goes on with scans that arrive, until it is stopped.
        settled: seconds for which nothing of a scan may change before it is read (``watch`` only).
        patience: seconds after which a scan that cannot be read is moved aside (``watch`` only).
        page: writes a page for each scan.
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
    """

    model: str
    scans: str
    out: str = ""
    watch: bool = False
    settled: float = 1.0
    patience: float = 30.0
    page: bool = True
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self):
        if self.settled < 0 or self.patience < self.settled:
            raise ConfigError(f"need 0 <= settled <= patience, got {self.settled} and {self.patience}")


def predict(config: PredictConfig) -> None:
    """Inspects scans and writes what it found.

    Raises:
        ConfigError: ``out`` is missing or used by another process.
        DataError: without ``watch``: a scan cannot be inspected, once all others are.
        Interrupted: a signal came; what is written stays, and the same command goes on.
    """
    if not config.out:
        raise ConfigError("--out is missing: name the folder of the results")
    out = Path(config.out)
    if (out / MODEL).is_file():
        raise ConfigError(f"--out {out} is a model: name another folder")
    inspector = Inspector.load(config.model, config.device)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", EXCLUSIVE, f"--out {out}: another process writes there"), _stopping() as stopped:
        _complete_table(out)
        if config.watch:
            _watch(config, inspector, out, stopped)
        else:
            _all(config, inspector, out, stopped)


def _all(config: PredictConfig, inspector: Inspector, out: Path, stopped: threading.Event):
    folders = [folder for folder in instance_folders(config.scans) if not (out / _name(folder) / RESULT).is_file()]
    failed, counts = [], dict.fromkeys(DECISIONS.values(), 0)
    with Progress("predict", len(folders), "scans") as progress:
        for folder, sample in _read_ahead(folders, inspector, stopped):
            try:
                if isinstance(sample, DataError):
                    raise sample
                inspection = inspector.inspect(sample)
            except DataError as error:
                failed.append(f"{folder.name}: {error}")
                progress.advance(note=f"{folder.name} cannot be inspected: {error}")
                continue
            _keep(config, out, inspection)
            counts[DECISIONS[inspection.anomalous]] += 1
            progress.advance(note=_line(inspection))
    if stopped.is_set():
        raise Interrupted("stopped; run the same command again to continue")
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing new"
    say(f"{out / TABLE}: {told}")
    if failed:
        raise DataError(f"{len(failed)} of {len(folders)} scans cannot be inspected, the first: {failed[0]}")


def _read_ahead(
    folders: list[Path], inspector: Inspector, stopped: threading.Event
) -> Iterator[tuple[Path, Sample | DataError]]:
    """Each scan in memory, the next one being read meanwhile."""

    def read(folder: Path) -> Sample | DataError:
        try:
            return held(read_instance(folder, inspector.rig)[0])
        except DataError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(read, folder) for folder in folders[:1]]
        for place, folder in enumerate(folders):
            if stopped.is_set():
                return
            sample = waiting.pop().result()
            if place + 1 < len(folders):
                waiting.append(pool.submit(read, folders[place + 1]))
            yield folder, sample


def _watch(config: PredictConfig, inspector: Inspector, out: Path, stopped: threading.Event):
    """Inspects what arrives; a scan is read once nothing of it has changed for a while."""
    scans, seen = Path(config.scans), {}
    if not scans.is_dir():
        raise DataError(f"{scans} is not a folder")
    say(f"{scans}: watched; stop with Ctrl-C")
    while not stopped.is_set():
        worked, now = False, time.monotonic()
        folders = sorted(path for path in scans.iterdir() if path.is_dir() and not path.name.startswith("."))
        seen = {path: seen[path] for path in folders if path in seen}
        for folder in folders:
            if stopped.is_set() or (out / folder.name / RESULT).is_file():
                continue
            state = _state(folder)
            before, since = seen.get(folder, (None, now))
            seen[folder] = (state, since if state == before else now)
            still = now - seen[folder][1]
            if state != before or still < config.settled:
                continue
            try:
                refuse_link_out(folder, scans.resolve())
                sample = held(read_instance(folder, inspector.rig)[0])
                inspection = inspector.inspect(sample)
            except DataError as error:
                # What is copied slowly, or view by view, is not whole yet.
                if still >= config.patience:
                    _reject(folder, out, error)
                    worked = True
                continue
            _keep(config, out, inspection)
            say(_line(inspection))
            worked = True
        if not worked:
            stopped.wait(min(0.2, max(config.settled / 4, 0.02)))
    raise Interrupted(f"stopped; {out} holds all that was inspected, the same command goes on")


def _state(folder: Path) -> tuple:
    """Names, sizes and times of all files of a scan; files that vanish meanwhile count as changed."""
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    except FileNotFoundError:
        return ("changed", time.monotonic_ns())


def _reject(folder: Path, out: Path, error: DataError):
    target = out / REJECTED / folder.name
    number = 2
    while target.exists():
        target = out / REJECTED / f"{folder.name}.{number}"
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        # Nothing is written where it leads; the reason says where that is.
        folder.unlink()
        target.mkdir()
    else:
        shutil.move(folder, target)
    (target / "reason.txt").write_text(f"{error}\n", encoding="utf-8")
    say(f"{folder.name}: moved to {target}: {error}")


def _keep(config: PredictConfig, out: Path, inspection: Inspection):
    """The folder of a scan in one step, and its line of the table."""
    target, partial = out / inspection.name, out / f".{inspection.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    facts = inspection.facts()
    if inspection.volume is not None:
        voxels = inspection.volume.voxels
        write_ply(partial / "volume.ply", 1000 * voxels.centers, inspection.volume.score)
    if config.page:
        write_inspection_page(partial / "page.html", inspection)
    (partial / RESULT).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, target)
    _append(out, [facts])


def _append(out: Path, results: list[dict]):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not (out / TABLE).is_file():
        writer.writerow(COLUMNS)
    for facts in results:
        first = facts["defects"][0] if facts["defects"] else {}
        extent = max(first["extent"]) if first.get("unit") == "mm" else ""
        row = [facts["name"], DECISIONS[facts["anomalous"]], facts["score"], facts["threshold"], len(facts["defects"])]
        writer.writerow([*row, extent, first.get("deviation", ""), round(sum(facts["seconds"].values()), 3)])
    with open(out / TABLE, "a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def _complete_table(out: Path):
    """Lines of scans whose folders are there, but that a kill kept out of the table."""
    table = out / TABLE
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        table.write_text(text, encoding="utf-8")
    known = {row[0] for row in csv.reader(io.StringIO(text)) if row}
    missing = [path for path in sorted(out.glob(f"*/{RESULT}")) if path.parent.name not in known]
    if missing:
        _append(out, [json.loads(path.read_text(encoding="utf-8")) for path in missing])


def _name(folder: Path) -> str:
    return folder.resolve().name


def _line(inspection: Inspection) -> str:
    threshold = inspection.decision.threshold
    told = f"{inspection.name}: {DECISIONS[inspection.anomalous]}, score {inspection.score:.4g}"
    told += "" if threshold is None else f" of {threshold:.4g}"
    if not inspection.defects:
        return told
    first = inspection.defects[0]
    place = ", ".join(f"{value:.1f}" for value in first.position)
    deviation = "" if first.deviation is None else f", {first.deviation:+.2f} mm"
    more = f" and {len(inspection.defects) - 1} more" if len(inspection.defects) > 1 else ""
    return f"{told}; at ({place}) {first.unit}{deviation}{more}"


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that signals set: the scan in work is finished first, so none is judged twice or lost."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
