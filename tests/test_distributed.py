"""Two processes over gloo compute what one process computes."""

import dataclasses
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dino_depth import distributed
from dino_depth.pretrain import checkpoint
from dino_depth.pretrain.losses import koleo, sinkhorn
from dino_depth.pretrain.train import pretrain


def _environment(rank: int, world: int, port: int):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _losses(rank: int, world: int, port: int, folder: str):
    _environment(rank, world, port)
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    rows = data["logits"].split([5, 7])[rank]
    features = data["features"].chunk(world)[rank].clone().requires_grad_()
    loss = koleo(features)
    loss.backward()
    torch.save(
        {"targets": sinkhorn(rows, 0.05, 3), "loss": loss.detach(), "gradient": features.grad},
        f"{folder}/rank{rank}.pt",
    )
    distributed.stop()


def test_sinkhorn_and_koleo_run_over_all_ranks(tmp_path):
    data = {"logits": torch.rand(12, 20) * 2 - 1, "features": torch.randn(8, 4)}
    torch.save(data, tmp_path / "data.pt")
    multiprocessing.spawn(_losses, (2, _free_port(), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.allclose(torch.cat([rank["targets"] for rank in ranks]), sinkhorn(data["logits"], 0.05, 3), atol=1e-6)
    features = data["features"].requires_grad_()
    loss = koleo(features)
    loss.backward()
    assert all(rank["loss"].item() == pytest.approx(loss.item(), rel=1e-5) for rank in ranks)
    # Gradients are averaged over ranks afterwards, so each rank holds the whole gradient of its rows twice over.
    gathered = torch.cat([rank["gradient"] for rank in ranks]) / 2
    assert torch.allclose(gathered, features.grad, atol=1e-5)


def _train(rank: int, world: int, port: int, config):
    _environment(rank, world, port)
    torch.set_num_threads(1)
    pretrain(config)


def test_two_ranks_train_the_weights_of_one(tiny, tmp_path):
    model = dataclasses.replace(tiny.model, drop_path=0.0)
    short = dataclasses.replace(tiny.train, steps=5)
    one = dataclasses.replace(tiny, out=str(tmp_path / "one"), model=model, train=short)
    pretrain(one)
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    multiprocessing.spawn(_train, (2, _free_port(), two), nprocs=2)
    single, double = (checkpoint.load(checkpoint.checkpoints(Path(run.out))[-1]) for run in (one, two))
    for name, value in single["teacher"].items():
        assert torch.allclose(double["teacher"][name], value, atol=1e-4), name
