"""One optimisation step of ViT-S/14, 65,536 prototypes, 2x224 + 8x98 crops: speed, utilisation, memory, stages.

    python benchmarks/pretrain_step.py                                # one JSON line
    python benchmarks/pretrain_step.py --shards SHARDS                # with the data loader and what it is waited for
    python benchmarks/pretrain_step.py --table [--shards SHARDS]      # Markdown: without each optimisation, one by one
    python benchmarks/pretrain_step.py --without packing sinkhorn     # see plain.py
    python benchmarks/pretrain_step.py --peer PEER.py --rounds 3      # interleaved with a peer, prints the ratio

Words that are not options are settings: ``--config pretrain_vit_b --model.attention varlen --train.compile true``.
``--dtype bf16`` does what pretraining does: bfloat16 where the device has units for it. ``bf16-forced`` always does.

Utilisation is the operations a step needs, counted (flops.py), over time and the rate of large matrix products measured
in the same process. ``utilisation`` counts what is computed; ``utilisation_of_whole`` what the step would compute if
stochastic depth saved nothing, as papers that do not skip count it. ``data_wait`` is the share of a step in which the
loop waits for the loader. Memory is what torch allocated on a GPU, or the resident set on a CPU.

The peer is a script that takes ``b=8 c=1 dtype=bf16 steps=4`` and prints a JSON line with "total" seconds per step.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from flops import counted, derived, make_crops, make_masks, matrix_rate
from plain import OPTIMISATIONS

from dino_depth import device as devices
from dino_depth.compiled import compiling
from dino_depth.config import PretrainConfig, parse
from dino_depth.pretrain import student_teacher
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.loading import make_loader, next_batch, on_device, open_maps
from dino_depth.pretrain.optim import build_optimizer, clip, schedule, set_rates
from dino_depth.pretrain.student_teacher import Networks
from dino_depth.progress import peak_memory
from dino_depth.shards import DepthShards
from dino_depth.vit import probe_attention

WARM_UP = 3
MAPS = {
    "on disk": [],
    "in memory": ["--data.resident", "true"],
    "on the device": ["--data.on_device", "true"],
}
STAGES = ("data", "teacher", "student", "backward", "optimizer", "ema")


def synthetic(config: PretrainConfig, device: torch.device):
    """Batches without a loader: the same noise every step, other masks."""
    crops, step = make_crops(config, config.train.batch), 0
    while True:
        batch = Batch.make(crops, make_masks(config, config.train.batch, step), config, step)
        yield batch.pin_memory() if device.type == "cuda" else batch
        step += 1


def measure(config: PretrainConfig, steps: int, forced: bool, profile: str = "", count: bool = True) -> dict:
    """Medians over ``steps`` steps, after some to warm up (and to compile)."""
    device = devices.pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        devices.reuse_memory()
    config.train.steps = 10**6
    batch, iterations = config.train.batch, config.loss.sinkhorn_iterations
    torch.manual_seed(0)
    student, teacher = Networks(config).to(device), Networks(config).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimizer = build_optimizer(student, config)
    loader, maps = synthetic(config, device), None
    if config.data.shards:
        maps = open_maps(DepthShards.configured(config.data), config.data, device)
        loader = make_loader(maps, config, 0, device)

    def precision():
        if forced:
            return torch.autocast(device.type, torch.bfloat16)
        return devices.autocast(device, config.train.precision)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(number: int, lap):
        data = next_batch(loader)
        lap("wait")
        data = on_device(data, maps, device)
        lap("data")
        now = schedule(config, 2000 + number)
        set_rates(optimizer, now)
        with precision():
            targets = student_teacher.teacher_targets(teacher, data, now.teacher_temperature, iterations)
            lap("teacher")
            losses = student_teacher.student_losses(student, data, targets, config)
        lap("student")
        losses["loss"].backward()
        lap("backward")
        clip(student, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        student_teacher.update_teacher(teacher, student, now.momentum)
        lap("ema")

    narrow = forced or (config.train.precision == "bf16" and devices.has_bfloat16_units(device))
    dtype = torch.bfloat16 if narrow else torch.float32
    # Before and after the steps: on a machine that others use, one moment may be a bad one.
    rate = matrix_rate(device, dtype) if count else 0.0
    stages, totals, waits = {name: [] for name in STAGES}, [], []
    with compiling(config.train.compile):
        for number in range(WARM_UP):
            step(number, lambda name: None)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Without a loader, the noise is drawn outside the step. Waiting for each stage's kernels would slow a GPU down,
        # so every other step is timed as a whole only.
        for number in range(WARM_UP, WARM_UP + 2 * steps):
            since = begin = wait()
            whole, waited = number % 2, 0.0

            def lap(name, whole=whole):
                nonlocal since, waited
                if name == "wait":
                    waited, since = time.perf_counter() - since, time.perf_counter()
                elif not whole:
                    now = wait()
                    stages[name].append(now - since)
                    since = now

            step(number, lap)
            if whole:
                totals.append(wait() - begin - (0 if config.data.shards else waited))
                waits.append(waited)
        if profile:
            profiled(step, profile)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    total, parts = statistics.median(totals), {name: statistics.median(values) for name, values in stages.items()}
    figures = {"total": total, "images_per_second": batch / total, "peak_memory_gib": memory / 2**30}
    figures |= {"share": {name: value / sum(parts.values()) for name, value in parts.items()}}
    if config.data.shards:
        figures["data_wait"] = sum(waits) / sum(totals)
    if count:
        rate = max(rate, matrix_rate(device, dtype))
        grouped = replace(config, model=replace(config.model, attention="grouped"))
        whole = replace(grouped, model=replace(grouped.model, drop_path=0.0))
        operations = counted(grouped, batch)
        figures |= {"gflop_per_image": operations / 1e9, "gflop_per_image_derived": derived(config, batch) / 1e9}
        figures |= {"matrix_tflops": rate / 1e12, "utilisation": operations * batch / total / rate}
        figures |= {"utilisation_of_whole": counted(whole, batch) * batch / total / rate}
    return figures


def profiled(step, sort: str):
    with torch.profiler.profile() as record:
        step(0, lambda name: None)
    print(record.key_averages().table(sort_by=f"self_{sort}_time_total", row_limit=30, max_name_column_width=50))


def rounded(value):
    """Four significant digits, inside dictionaries too."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}")


def run(words: list[str]) -> dict:
    """The figures of one measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table_rows(config: PretrainConfig, options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> further words of one measurement."""
    device, rows = devices.pick_device(config.train.device), {"as configured": []}
    narrow = config.train.precision == "bf16" and devices.has_bfloat16_units(device)
    absent = set() if narrow else {"bf16"}
    if device.type == "cuda":
        absent |= {"allocator", "onednn", "attention_by_products"}
    else:
        absent |= {"onednn"} if narrow or not devices.wants_onednn() else set()
        absent |= set() if narrow else {"attention_by_products"}
    absent |= set() if config.train.compile else {"compile"}
    for name in options.without or OPTIMISATIONS:
        if name not in absent:
            rows[f"without {name}"] = ["--without", name]
    for backend, more in (("varlen", []), ("xformers", ["--train.compile", "false"])):
        if reason := probe_attention(backend, device.type, torch.bfloat16):
            print(f"attention {backend} left out: {reason[:90]}", file=sys.stderr)
        else:
            rows[" ".join(["attention", backend, *more])] = ["--model.attention", backend, *more]
    if options.shards:
        for place in options.maps:
            rows[f"loader, maps {place}"] = ["--shards", options.shards, *MAPS[place]]
    return rows


def table(rows: dict[str, list[str]], words: list[str], rounds: int):
    """Markdown: medians over interleaved rounds."""
    found = {name: [] for name in rows}
    for number in range(rounds):
        for name, more in rows.items():
            counting = name == "as configured" and not number
            found[name].append(run([*words, *more, *([] if counting else ["--no_count"])]))
            print(f"{name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
    base = found["as configured"][0]
    medians = {
        name: {key: statistics.median(value[key] for value in values) for key in values[-1] if key != "share"}
        for name, values in found.items()
    }
    print("| step | s | images/s | time | peak GiB | wait for data |\n|---|---|---|---|---|---|")
    for name, row in medians.items():
        ratio = row["total"] / medians["as configured"]["total"]
        print(f"| {name} | {row['total']:.4g} | {row['images_per_second']:.4g} | {ratio:.2f} x ", end="")
        print(f"| {row['peak_memory_gib']:.1f} | {format(row['data_wait'], '.1%') if 'data_wait' in row else ''} |")
    speed = base["total"] / medians["as configured"]["total"]  # utilisation at the median of all rounds
    print(
        f"\n{base['gflop_per_image']:.1f} GFLOP per image counted, {base['gflop_per_image_derived']:.1f} derived. "
        f"Large matrix products reach {base['matrix_tflops']:.3g} TFLOP/s here; the step as configured uses "
        f"{base['utilisation'] * speed:.1%} of that, or {base['utilisation_of_whole'] * speed:.1%} counted as if "
        "stochastic depth saved nothing."
    )
    print("Stages: " + ", ".join(f"{name} {share:.0%}" for name, share in base["share"].items()) + ".")


def compare(options: argparse.Namespace, config: PretrainConfig, words: list[str]):
    """Interleaves steps with a peer's; exit 4 above the gate."""
    theirs = [options.peer_python, options.peer, f"b={options.batch}", "c=1", f"dtype={options.dtype[:4]}"]
    theirs += [f"steps={options.steps}", f"dp={config.model.drop_path}", *options.peer_arguments.split()]
    ratios = []
    for number in range(options.rounds):
        ours = run([*words, "--no_count"])["total"]
        done = subprocess.run(theirs, capture_output=True, text=True, check=True)
        peer = json.loads(done.stdout.strip().splitlines()[-1])["total"]
        ratios.append(ours / peer)
        print(f"round {number}: {ours:.2f} s, peer {peer:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")
    if options.gate and statistics.median(ratios) > options.gate:
        sys.exit(4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain")
    parser.add_argument("--shards", help="measure with the loader of these shards")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "bf16-forced", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--without", nargs="+", action="extend", choices=OPTIMISATIONS, default=[])
    parser.add_argument("--table", action="store_true", help="with --shards also with the loader, see --maps")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS), help="where the loader's maps lie")
    parser.add_argument("--no_count", action="store_true", help="leave out operations and utilisation")
    parser.add_argument("--profile", choices=["cpu", "cuda"], default="", help="print the kernels of one more step")
    parser.add_argument("--peer", help="peer script to interleave with")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--peer_arguments", default="", help="further key=value words for the peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gate", type=float, help="largest ratio to the peer; exit 4 above it")
    options, settings = parser.parse_known_args()
    words = ["--config", options.config, "--train.batch", str(options.batch), "--train.threads", str(options.threads)]
    words += ["--train.precision", options.dtype[:4], "--data.shards", options.shards or ""]
    config = parse(PretrainConfig, [*words, *settings], "pretrain_step")
    same = [f"--{name}={getattr(options, name)}" for name in ("config", "batch", "dtype", "steps", "threads")]
    same += settings
    if options.table:
        table(table_rows(config, options), same, options.rounds)
    elif options.peer:
        compare(options, config, [*same, *(["--without", *options.without] if options.without else [])])
    else:
        for name in options.without:
            OPTIMISATIONS[name](config)
        with contextlib.redirect_stdout(sys.stderr) if not options.profile else contextlib.nullcontext():
            figures = measure(
                config, options.steps, options.dtype == "bf16-forced", options.profile, not options.no_count
            )
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
