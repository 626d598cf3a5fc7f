"""What pretraining asks of 8, 64 and 512 GPUs, by counting: memory, traffic, checkpoints and loader cores. Markdown.

    python benchmarks/many_gpus.py [--share 0.35] [--maps_per_second 82]

Weights and operations are those of the shipped networks, counted; rates are stated assumptions. Each GPU holds the
whole state (DistributedDataParallel): the student, its gradient and AdamW's two moments in float32, and the teacher. A
ring sends a gradient, and what Sinkhorn sums (a vector of K per head and iteration), nearly twice. KoLeo gathers class
tokens and compares all pairs of the global batch.
"""

import argparse

import torch
from flops import derived

from dino_depth.config import PretrainConfig, parse
from dino_depth.pretrain.student_teacher import Networks

CONFIGS = {"ViT-S/14": "pretrain", "ViT-B/14": "pretrain_vit_b", "ViT-L/14": "pretrain_vit_l"}
GPUS = {8: 128, 64: 64, 512: 8}  # and maps on each: batches of 1,024, 4,096 and 4,096
RATE = 790e12  # dense bfloat16 operations per second that large products reach on an H200, published
INSIDE, ACROSS = 450e9, 50e9  # bytes per second and GPU: NVLink in a node of 8; 400 Gbit/s between nodes
WRITE = 2e9  # bytes per second of a checkpoint to a parallel file system
SENT_WHILE_COMPUTING = 0.4  # share of a step in which gradients are computed, and can be sent


def row(name: str, config: PretrainConfig, gpus: int, maps: int, share: float, per_core: float) -> str:
    with torch.device("meta"):
        weights = sum(part.numel() for part in Networks(config).parameters())
    seconds = maps * derived(config, 64) / (share * RATE)
    gradient = 2 * (gpus - 1) / gpus * 4 * weights
    wire = INSIDE if gpus <= 8 else ACROSS
    sinkhorn = 2 * 2 * config.loss.sinkhorn_iterations * 4 * config.loss.prototypes
    pairs = 4 * (gpus * maps) ** 2  # of one set of global crops; the other's come after it
    late = " (waits)" if gradient / wire > SENT_WHILE_COMPUTING * seconds else ""
    return (
        f"| {name} | {gpus} x {maps} | {weights / 1e6:.0f} | {20 * weights / 1e9:.1f} | {seconds * 1e3:.0f} "
        f"| {gradient / 1e9:.2f} | {gradient / wire * 1e3:.0f}{late} | {sinkhorn / 1e6:.1f} "
        f"| {pairs / 1e9:.2f} | {16 * weights / 1e9:.1f} | {16 * weights / WRITE:.0f} "
        f"| {maps / seconds / per_core:.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.35, help="of the matrix rate that a step reaches")
    parser.add_argument("--maps_per_second", type=float, default=82, help="of one loader process, see loader.py")
    options = parser.parse_args()
    print(
        "| network | GPUs x maps | weights, M | state, GB a GPU | step, ms | gradient sent, GB | sending, ms "
        "| Sinkhorn, MB | KoLeo's pairs, GB | checkpoint, GB | writing, s | loader cores a GPU |"
    )
    print("|" + "---|" * 12)
    for name, config in CONFIGS.items():
        for gpus, maps in GPUS.items():
            found = parse(PretrainConfig, ["--config", config], "many_gpus")
            print(row(name, found, gpus, maps, options.share, options.maps_per_second))


if __name__ == "__main__":
    main()
