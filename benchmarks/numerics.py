"""Does every fast path of a training step compute what the plain one does, on this machine? Exits 4 where it does not.

    python benchmarks/numerics.py [--device cuda] [--tiny] [--backend inductor]

One step from the same weights, crops and masks, each way; the error is that of the loss and of the gradient of each
network part, relative in norm, the largest of them. Residual branches have scale 1, so that they count as much as after
a long training. KoLeo is left out: untrained features lie so close together that its gradient is a matter of rounding.
TF32 is off. Limits are those of the arithmetic: rounding for float32, some bits of bfloat16 behind a temperature of
0.05, half a 16-bit code for crops.
"""

import argparse
import sys
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import plain
import torch
from flops import make_crops, make_masks

from dino_depth.compiled import compiling, is_compiling
from dino_depth.config import PretrainConfig, parse
from dino_depth.depth import DepthMap, normalize
from dino_depth.device import pick_device
from dino_depth.pretrain import losses, student_teacher
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.crops import draw_crops, multi_crop
from dino_depth.pretrain.resident import ResidentMaps
from dino_depth.pretrain.student_teacher import Networks
from dino_depth.vit import probe_attention

FLOAT32, BFLOAT16, NARROW = 1e-3, 0.05, 0.1  # float32 against itself, bfloat16 against itself, against float32
# What pretrain_step.py can leave out and computes the same; the others change the configuration or move weights.
SAME = ("packing", "last_rows", "in_place", "scaled_weights", "sinkhorn", "cross_entropy", "weight_norm")
TINY = ["--config", "pretrain_demo", "--model.dim", "64", "--model.heads", "2", "--train.batch", "6"]
FULL = ["--config", "pretrain", "--train.batch", "16", "--loss.prototypes", "65536"]


def settings(tiny: bool) -> PretrainConfig:
    words = [*(TINY if tiny else FULL), "--model.layer_scale", "1", "--loss.koleo_weight", "0"]
    return parse(PretrainConfig, [*words, "--model.drop_path", "0.3"], "numerics")


def step(config: PretrainConfig, device: torch.device, narrow: bool, backend: str | None = None) -> dict:
    """Loss, and gradient of each part of the student, float64 on the CPU."""
    torch.manual_seed(0)
    student, teacher = Networks(config), Networks(config).requires_grad_(False)
    crops, masks = make_crops(config, config.train.batch), make_masks(config, config.train.batch)
    student, teacher = student.to(device), teacher.to(device)
    with compiling(backend is not None, backend or ""):
        batch = Batch.make(crops, masks, config, 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            targets = student_teacher.teacher_targets(teacher, batch, 0.05, 3)
            loss = student_teacher.student_losses(student, batch, targets, config)["loss"]
        loss.backward()
    found = {"loss": loss.detach().double().cpu()}
    for name, part in student.named_children():
        gradients = [weights.grad.flatten() for weights in part.parameters() if weights.grad is not None]
        found[name] = torch.cat(gradients).double().cpu()
    return found


def error(found: dict, wanted: dict) -> float:
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


def crop_error(config: PretrainConfig, device: torch.device) -> float:
    """Largest difference of crops made on the device from the loader's, over the range of a map's values."""
    random, worst = np.random.default_rng(0), 0.0
    rows, columns = np.mgrid[0:200, 0:240] / 200

    class Maps(list):
        def sample(self, index):
            return self[index], {}

    maps = Maps()
    for _ in range(8):
        depth = 0.5 + 0.1 * np.sin(random.uniform(3, 9) * rows) * columns + random.normal(0, 1e-3, rows.shape)
        maps.append(DepthMap.from_values(np.where(random.random(rows.shape) < 0.05, 0, depth)))
    config.data.workers = 0
    kept = ResidentMaps(maps, config.data, device)
    affines = np.stack([draw_crops(kept.validity[index], config.crops, 0, index) for index in range(len(maps))])
    together = kept.crop(torch.arange(len(maps)), torch.from_numpy(affines), config.crops)
    for index, depth_map in enumerate(maps):
        values = normalize(depth_map, config.data.normalization)
        alone = multi_crop(values, depth_map.valid, config.crops, 0, index)
        for ours, wanted in zip(together, alone, strict=True):
            ours = ours[index].cpu()
            # Where a footprint is half valid, two devices may round to either side.
            undecided = ((ours == 0) != (wanted == 0)).float().mean().item()
            difference = (ours - wanted)[(ours != 0) & (wanted != 0)].abs().max().item()
            worst = max(worst, difference / float(np.ptp(values[depth_map.valid])), undecided / 100)
    return worst


def checks(config: PretrainConfig, device: torch.device, backend: str):
    """Yields (what, error, limit or the reason why it did not run)."""
    exact = step(config, device, False)
    if device.type != "cpu":
        yield "float32 against float32 on the CPU", error(exact, step(config, torch.device("cpu"), False)), FLOAT32
    yield "bfloat16 against float32", error(narrow := step(config, device, True), exact), NARROW
    for name in SAME:
        plain.OPTIMISATIONS[name](config)
        yield f"float32 against float32 without {name}", error(exact, step(config, device, False)), FLOAT32
        plain.put_back()
    yield f"compiled ({backend}) against eager, float32", error(step(config, device, False, backend), exact), FLOAT32
    yield f"compiled ({backend}) against eager, bfloat16", error(step(config, device, True, backend), narrow), BFLOAT16
    for attention in ("varlen", "xformers"):
        if reason := probe_attention(attention, device.type, torch.bfloat16):
            yield f"attention {attention} against grouped", None, reason[:90]
            continue
        config.model.attention = attention
        yield f"attention {attention} against grouped, bfloat16", error(step(config, device, True), narrow), BFLOAT16
        if attention == "varlen":  # xformers wants lengths as Python numbers
            found = step(config, device, True, backend)
            yield f"attention {attention}, compiled, against grouped, bfloat16", error(found, narrow), BFLOAT16
        config.model.attention = "grouped"
    # Half a code is 1 / 131068 of the range; the device's sums and the loader's are float32 both.
    yield "crops of resident maps against the loader's", crop_error(config, device), 2e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a network that a CPU steps in milliseconds")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    failed = []
    print("| check | error | limit |\n|---|---|---|")
    with ExitStack() as closing:
        # Compiled passes over logits are for GPUs; a check on a CPU is of these as well.
        closing.enter_context(patch.object(losses, "_fuses", lambda logits: is_compiling()))
        for what, found, limit in checks(settings(options.tiny), device, options.backend):
            if found is None:
                print(f"| {what} | not run | {limit} |", flush=True)
                continue
            print(f"| {what} | {found:.1e} | {limit:.1e} |", flush=True)
            failed += [] if found <= limit else [what]  # also where it is not a number
    if failed:
        print(f"numerics: beyond the limit: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
