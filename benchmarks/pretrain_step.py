"""Time of one optimisation step, ViT-S/14, 65,536 prototypes, 2x224 + 8x98 crops, beside a peer's on this machine.

    python benchmarks/pretrain_step.py                                # this project alone
    python benchmarks/pretrain_step.py --peer PEER.py --rounds 3      # interleaved with a peer, prints the ratio

``--dtype bf16`` does what pretraining does: bfloat16 where the device has units for it. ``bf16-forced`` always does.

The peer is a script that takes ``b=8 c=1 dtype=bf16 steps=4`` and prints a JSON line with "total" seconds per step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from dino_depth.config import PretrainConfig
from dino_depth.device import autocast, pick_device, reuse_memory
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.optim import build_optimizer, clip, schedule, set_rates
from dino_depth.pretrain.student_teacher import Batch, Networks, student_losses, teacher_targets, update_teacher


def measure(batch: int, dtype: str, steps: int, threads: int, drop_path: float, profile: bool) -> dict:
    """Median seconds of each stage over ``steps`` steps, after two to warm up."""
    torch.set_num_threads(threads)
    device = pick_device("auto")
    if device.type == "cpu":
        reuse_memory()
    config = PretrainConfig()
    config.model.drop_path = drop_path
    config.train.batch = batch
    torch.manual_seed(0)
    student, teacher = Networks(config).to(device), Networks(config).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimizer = build_optimizer(student, config)
    side, small, crops = config.crops.global_size, config.crops.local_size, config.crops.local_crops
    inputs = torch.randn(batch, 2, 1, side, side), torch.randn(batch, crops, 1, small, small)
    stages: dict[str, list[float]] = {}
    forced = torch.autocast(device.type, torch.bfloat16) if dtype == "bf16-forced" else None

    def precision():
        return forced or autocast(device, dtype)

    def lap(name: str, since: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        stages.setdefault(name, []).append(now - since)
        return now

    for step in range(steps + 2):
        if step == 2:
            stages.clear()
        masks = [draw_masks(side // 14, config.loss, 0, step * batch + place) for place in range(batch)]
        begin = since = time.perf_counter()
        data = Batch.make(*inputs, torch.stack([torch.from_numpy(mask) for mask in masks]), device, config, step)
        now = schedule(config, 2000 + step)
        set_rates(optimizer, now)
        with precision():
            targets = teacher_targets(teacher, data, now.teacher_temperature, config.loss.sinkhorn_iterations)
            since = lap("teacher", since)
            losses = student_losses(student, data, targets, config)
        since = lap("student", since)
        losses["loss"].backward()
        since = lap("backward", since)
        clip(student, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        since = lap("optimizer", since)
        update_teacher(teacher, student, now.momentum)
        lap("ema", since)
        lap("total", begin)
    if profile:
        with torch.profiler.profile() as record, precision():
            targets = teacher_targets(teacher, data, 0.05, 3)
            student_losses(student, data, targets, config)["loss"].backward()
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {name: round(statistics.median(values), 4) for name, values in stages.items()}
    return figures | {"images_per_second": round(batch / figures["total"], 2), "peak_memory_gib": round(memory, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "bf16-forced", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop_path", type=float, default=0.3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", help="peer script to interleave with")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--peer_arguments", default="", help="further key=value words for the peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gate", type=float, help="largest ratio to the peer; exit 4 above it")
    options = parser.parse_args()
    if not options.peer:
        result = measure(
            options.batch, options.dtype, options.steps, options.threads, options.drop_path, options.profile
        )
        print(json.dumps(result))
        return
    common = [f"--batch={options.batch}", f"--dtype={options.dtype}", f"--steps={options.steps}"]
    ours = [sys.executable, __file__, *common, f"--threads={options.threads}", f"--drop_path={options.drop_path}"]
    words = [
        f"b={options.batch}",
        "c=1",
        f"dtype={options.dtype[:4]}",
        f"steps={options.steps}",
        f"dp={options.drop_path}",
    ]
    theirs = [options.peer_python, options.peer, *words, *options.peer_arguments.split()]
    ratios = []
    for round_ in range(options.rounds):
        seconds = []
        for command in (ours, theirs):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(json.loads(done.stdout.strip().splitlines()[-1])["total"])
        ratios.append(seconds[0] / seconds[1])
        print(f"round {round_}: {seconds[0]:.2f} s, peer {seconds[1]:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")
    if options.gate and statistics.median(ratios) > options.gate:
        sys.exit(4)


if __name__ == "__main__":
    main()
