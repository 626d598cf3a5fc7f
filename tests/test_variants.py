"""Registers, rotary positions and recomputed activations from pretraining through export to the next run."""

import dataclasses

import pytest
import torch

from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.optim import build_optimizer
from dino_depth.pretrain.student_teacher import Networks
from dino_depth.pretrain.train import pretrain
from dino_depth.publish.export import ExportConfig, export

VARIANTS = [{"registers": 2}, {"positions": "rotary", "registers": 3, "checkpoint_activations": True}]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_variant_is_trained_exported_and_continued(tiny, settings, tmp_path):
    tiny.model, tiny.train.steps = dataclasses.replace(tiny.model, **settings), 2
    pretrain(tiny)
    export(ExportConfig(run=tiny.out, out=str(tmp_path / "out"), image_size=84, samples=2))
    pretrain(dataclasses.replace(tiny, init_from=str(tmp_path / "out"), out=str(tmp_path / "next")))


@pytest.mark.parametrize("registers", [0, 2])
def test_the_losses_read_class_tokens_and_hidden_patches(tiny, registers):
    tiny.model.registers, tiny.model.drop_path = registers, 0.0
    backbone = Networks(tiny).backbone
    masks = torch.stack([torch.from_numpy(draw_masks(3, tiny.loss, 0, place)) for place in range(4)])
    crops = torch.randn(4, 2, 1, 42, 42), torch.randn(4, 2, 1, 14, 14)
    batch = Batch.make(crops, masks, tiny)
    pack = [batch.global_crops, batch.local_crops], [batch.masks, None]
    whole, local = backbone.forward_packed(*pack)
    wanted = torch.cat([whole[:, 0], whole[:, 1 + registers :][batch.masks], local[:, 0]])
    torch.testing.assert_close(backbone.forward_packed(*pack, batch.needed), wanted, atol=1e-5, rtol=0)


def test_every_token_before_the_blocks_has_the_embeddings_rate(tiny):
    tiny.model.registers, tiny.model.depth = 2, 5
    student = Networks(tiny)
    rates = {
        id(weight): group["rate"] for group in build_optimizer(student, tiny).param_groups for weight in group["params"]
    }
    backbone, decay = student.backbone, tiny.optim.layer_decay
    for token in (backbone.cls_token, backbone.reg_token, backbone.pos_embed, backbone.mask_token):
        assert rates[id(token)] == pytest.approx(decay**6)
    for place, block in enumerate(backbone.blocks):
        assert rates[id(block.mlp.fc1.weight)] == pytest.approx(decay ** (5 - place))
    assert rates[id(backbone.norm.weight)] == 1
