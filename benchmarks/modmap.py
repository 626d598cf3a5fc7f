"""Time of ModMap's maps of one sample, beside the release's order of work on the same encoders in the same run.

    python benchmarks/modmap.py [--json FILE] [--svg FILE] [--gate]
    python benchmarks/modmap.py --size 896 --image vitb --counts 9 18 36 --tf32        # the paper's sizes, on a GPU

The release encodes source and target again for every pair of views, one pair at a time, and keeps the maps of all
pairs until it takes their minimum. Here every view is encoded once per modality and the minimum runs along. The
encoders are Vision Transformers with random weights: time does not depend on what they have learned.

The second table holds the cost at several numbers of views, each stage's share of it, and each stage as a multiple of
what its matrix products would take at the rate of one large product on the same device. On a CPU, times are the
process's own, since other processes may run beside it.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.heads.modmap import Config, ModMap, fit, score
from dino_depth.anomaly.heads.modmap.crossmodal import crossmodal_distances, view_codes
from dino_depth.config import ModelConfig
from dino_depth.device import pick_device, reuse_memory
from dino_depth.errors import GateError
from dino_depth.vit import DepthTransformer

PAPER = 2886.768  # milliseconds a sample of 36 views, 896 pixels, ViT-B/14 and ViT-S/14, supplement B.1
FASTER, ERROR = 8.0, 1e-5  # what the gate asks for
ARCHITECTURES = {"vits": (384, 6), "vitb": (768, 12)}


def make_encoder(name: str, size: int, device: torch.device) -> DepthTransformer:
    """Random weights whose tokens differ from patch to patch."""
    dim, heads = ARCHITECTURES[name]
    config = ModelConfig(dim=dim, heads=heads, layer_scale=1.0, initialization="xavier")
    return DepthTransformer(config, size).eval().requires_grad_(False).to(device)


def make_head(views: int, dims: tuple[int, int], device: torch.device) -> ModMap:
    """A head whose modulators are no longer the identity; one training step makes it complete."""
    random = SampleFeatures(*(torch.randn(views, 2, 2, dim) for dim in dims), torch.ones(views, 2, 2))
    head = fit([random], Config(steps=1), Context(0, device))
    for network in (head.members[0].image_modulator, head.members[0].depth_modulator):
        network[-1].weight.normal_(std=0.3)
    return head


def encode(encoder: DepthTransformer, images: Tensor, batch: int) -> Tensor:
    """(views, rows, columns, dim) of images (views, 1, size, size)."""
    tokens = torch.cat([encoder.forward_features(part)[:, 1:] for part in images.split(batch)])
    return tokens.unflatten(1, [math.isqrt(tokens.shape[1])] * 2)


@torch.inference_mode()
def encode_all(encoders: list[DepthTransformer], inputs: list[Tensor], batch: int) -> SampleFeatures:
    parts = [encode(encoder, images, batch) for encoder, images in zip(encoders, inputs, strict=True)]
    return SampleFeatures(*parts, torch.ones(parts[0].shape[:3]))


@torch.inference_mode()
def release_order(encoders: list[DepthTransformer], inputs: list[Tensor], head: ModMap) -> dict[str, Tensor]:
    """Maps of all views, every pair of views on its own from its pixels."""
    views, device = len(inputs[0]), inputs[0].device
    maps = {"image": [], "depth": []}
    for target in range(views):
        pairs = []
        for source in range(views):
            ends = [
                [encode(encoder, images[view : view + 1], 1) for encoder, images in zip(encoders, inputs, strict=True)]
                for view in (source, target)
            ]
            codes = view_codes(*torch.tensor([[source], [target], [0]]), views, 1).to(device)
            flat = [[part.flatten(1, 2) for part in end] for end in ends]
            pairs.append([part.cpu() for part in crossmodal_distances(head.members[0], *flat, codes)])
        for name, found in zip(maps, zip(*pairs, strict=True), strict=True):
            maps[name].append(torch.cat(found).amin(0).unflatten(0, ends[0][0].shape[1:3]))
    return {name: torch.stack(found) for name, found in maps.items()}


def seconds(work: Callable, device: torch.device) -> tuple[float, object]:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def fastest_product(device: torch.device) -> float:
    """Operations a second of the best of ten large float32 matrix products."""
    side = 2048 if device.type == "cpu" else 8192
    one, other = torch.randn(2, side, side, device=device)
    return 2 * side**3 / min(seconds(lambda: one @ other, device)[0] for _ in range(10))


def count_operations(work: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(encoders: list, inputs: list[Tensor], rounds: int, batch: int) -> dict:
    """Ours and the release's order, in turn; the ratio of each round, and the largest difference of the maps."""
    device = inputs[0].device
    head = make_head(len(inputs[0]), tuple(encoder.embed_dim for encoder in encoders), device)
    score(head, encode_all(encoders, inputs, batch))  # warm
    ours, theirs = [], []
    for _ in range(rounds):
        taken, mine = seconds(lambda: score(head, encode_all(encoders, inputs, batch)), device)
        ours.append(taken)
        taken, yours = seconds(lambda: release_order(encoders, inputs, head), device)
        theirs.append(taken)
    return {
        "views": len(inputs[0]),
        "ours": statistics.median(ours),
        "release": statistics.median(theirs),
        "ratio": statistics.median(there / here for here, there in zip(ours, theirs, strict=True)),
        "error": max(float((mine[name] - yours[name]).abs().max()) for name in mine),
        "spread": max(float(values.std()) for values in mine.values()),
    }


def cost(encoders: list, inputs: list[Tensor], rounds: int, batch: int, rate: float) -> dict:
    """Seconds of each stage at one number of views, and each as a multiple of its floor."""
    device, views = inputs[0].device, len(inputs[0])
    head = make_head(views, tuple(encoder.embed_dim for encoder in encoders), device)
    features = encode_all(encoders, inputs, batch)
    floors = [count_operations(lambda: encode_all(encoders, inputs, batch)) / rate]
    floors.append(count_operations(lambda: score(head, features)) / rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [
        (
            seconds(lambda: encode_all(encoders, inputs, batch), device)[0],
            seconds(lambda: score(head, features), device)[0],
        )
        for _ in range(rounds)
    ]
    encoding, mapping = (statistics.median(column) for column in zip(*times, strict=True))
    found = {"views": views, "encodes": 2 * views, "maps": views**2, "encoding": encoding, "mapping": mapping}
    found |= {"encoding_floor": floors[0], "mapping_floor": floors[1]}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def draw_svg(rows: list[dict]) -> str:
    """Encoding and mapping over the number of views, both axes logarithmic, with lines of slope 1 and 2."""
    width, height, margin = 480, 320, 50
    views = [math.log(row["views"]) for row in rows]
    values = [math.log(row[name]) for row in rows for name in ("encoding", "mapping")]
    low, high = min(values) - 0.3, max(values) + 0.3

    def place(view: float, value: float) -> str:
        x = margin + (view - views[0]) / (views[-1] - views[0]) * (width - 2 * margin)
        return f"{x:.1f},{height - margin - (value - low) / (high - low) * (height - 2 * margin):.1f}"

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    parts = [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    for name, colour, slope, below in (("encoding", "#1f77b4", 1, -8), ("mapping", "#d62728", 2, 18)):
        last = math.log(rows[-1][name])
        ends = place(views[0], last - slope * (views[-1] - views[0])), place(views[-1], last)
        parts.append(f'<polyline points="{" ".join(ends)}" fill="none" stroke="{colour}" stroke-dasharray="4"/>')
        for view, row in zip(views, rows, strict=True):
            x, y = place(view, math.log(row[name])).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
            label = f'<text x="{x}" y="{float(y) + below:.1f}" text-anchor="middle" fill="{colour}">'
            parts.append(f"{label}{row[name]:.3g} s</text>")
        parts.append(f'<text x="{margin}" y="{16 * slope}" fill="{colour}">{name}; dashed: N{"²" * (slope > 1)}</text>')
    for view, row in zip(views, rows, strict=True):
        x = place(view, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - margin + 20}" text-anchor="middle">N = {row["views"]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def measure(options: argparse.Namespace) -> dict:
    device = pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        reuse_memory()
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.manual_seed(0)
    encoders = [make_encoder(name, options.size, device) for name in (options.image, "vits")]
    inputs = [torch.randn(max(*options.counts, options.views), 1, options.size, options.size).to(device) for _ in "id"]
    rate = fastest_product(device)
    pair = compare(encoders, [part[: options.views] for part in inputs], options.rounds, options.batch)
    rows = [
        cost(encoders, [part[:count] for part in inputs], options.rounds + 2, options.batch, rate)
        for count in options.counts
    ]
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} CPU threads"
    setting = {"size": options.size, "image": options.image, "device": place, "tf32": options.tf32}
    return setting | {"operations_per_second": rate, "comparison": pair, "cost": rows}


def print_costs(rows: list[dict]):
    columns = f"{'views':>5s} {'encodes':>8s} {'maps':>6s} {'encoding':>17s} {'mapping':>17s} {'total':>11s}"
    print(f"{columns} {'over their floors':>18s}")
    for row in rows:
        total, stages, over = row["encoding"] + row["mapping"], [], []
        for name in ("encoding", "mapping"):
            stages.append(f"{row[name]:8.3f} s ({row[name] / total:4.0%})")
            over.append(f"{row[name] / row[f'{name}_floor']:.2f}")
        counts = f"{row['views']:5d} {row['encodes']:8d} {row['maps']:6d}"
        print(f"{counts} {stages[0]:>17s} {stages[1]:>17s} {total:9.3f} s {', '.join(over):>18s}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=12, help="of the comparison with the release's order")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16, 32], help="views of the cost table")
    parser.add_argument("--size", type=int, default=112, help="side of the input, pixels")
    parser.add_argument("--image", choices=sorted(ARCHITECTURES), default="vits")
    parser.add_argument("--batch", type=int, default=4, help="views encoded at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--gate", action="store_true", help=f"exit 4 below {FASTER}x or above {ERROR}")
    options = parser.parse_args()
    report = measure(options)
    pair = report["comparison"]
    print(f"{options.image}/14 + vits/14, {options.size} px, {report['device']}")
    figures = f"{pair['ours']:.3f} s, release's order {pair['release']:.3f} s: {pair['ratio']:.1f}x as fast"
    print(f"{pair['views']} views: {figures}; maps differ by {pair['error']:.1e}, they vary by {pair['spread']:.1e}\n")
    print_costs(report["cost"])
    if (options.size, options.image) == (896, "vitb"):
        print(f"\nthe paper, 36 views on its machine: {PAPER} ms")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(draw_svg(report["cost"]), encoding="utf-8")
    if options.gate and (pair["ratio"] < FASTER or pair["error"] > ERROR):
        raise GateError(f"{pair['ratio']:.1f}x as fast, wanted {FASTER}x; maps differ by {pair['error']:.1e}")


if __name__ == "__main__":
    try:
        main()
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
