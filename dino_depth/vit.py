"""The encoder: timm's Vision Transformer with one input channel, a mask token and packed crops.

``forward_packed`` runs crops of different sizes through the blocks in one pass: tokens of all sequences lie in one
(tokens, dim) matrix for norms, projections and MLPs, and only attention looks at sequence borders. A group is
(sequences, length): sequences of one length that lie one after the other. Outside training the inherited
``forward_features`` computes the same.
"""

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_depth.config import ModelConfig
from dino_depth.errors import ConfigError

__all__ = ["DepthTransformer", "packed_attention", "probe_attention", "resize_position_embedding"]

Groups = list[tuple[int, int]]


class DepthTransformer(VisionTransformer):
    """ViT with learned positions and a class token for (batch, 1, height, width) depth.

    Args:
        config: sizes; ViT-S/14 by default.
        image_size: pixels of the grid the position embedding is stored at.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(self, config: ModelConfig, image_size: int = 224):
        if image_size % config.patch_size:
            raise ConfigError(f"image size {image_size} is no multiple of model.patch_size {config.patch_size}")
        if config.dim % config.heads:
            raise ConfigError(f"model.dim {config.dim} is no multiple of model.heads {config.heads}")
        if not 0 <= config.drop_path < 1:
            raise ConfigError(f"model.drop_path must lie in [0, 1), got {config.drop_path}")
        if not config.layer_scale > 0:
            raise ConfigError(f"model.layer_scale must be positive, got {config.layer_scale}")
        super().__init__(
            img_size=image_size,
            patch_size=config.patch_size,
            in_chans=1,
            num_classes=0,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            init_values=config.layer_scale,
            dynamic_img_size=True,
        )
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))
        if config.initialization == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens (batch, 1 + patches, dim) of images (batch, 1, height, width).

        Args:
            masks: (batch, patches) bool; those patches become the mask token.
        """
        patches = self.patch_embed(images)  # (batch, rows, columns, dim)
        if masks is not None:
            masks = masks.view(*patches.shape[:3], 1)
            patches = torch.where(masks, self.mask_token.to(patches.dtype), patches)
        return self._pos_embed(patches)

    def forward_packed(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None],
        drop_path: float = 0.0,
        needed: Tensor | None = None,
    ) -> list[Tensor] | Tensor:
        """Normalised tokens of several sets of crops in one pass.

        Args:
            crops: each (batch_i, 1, side_i, side_i).
            masks: for each, (batch_i, patches_i) bool or None.
            drop_path: share of each set's sequences that skip a residual branch.
            needed: (rows,) of the pack that the caller reads. The last block's MLP, a twentieth of the work, then
                leaves out the others.

        Returns:
            for each set, (batch_i, 1 + patches_i, dim); with ``needed``, (rows, dim).
        """
        tokens = [self.embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        groups = [(part.shape[0], part.shape[1]) for part in tokens]
        packed = torch.cat([part.flatten(0, 1) for part in tokens])  # (tokens, dim)
        for block in self.blocks:
            packed = _residual(packed, groups, drop_path, lambda x, g, b=block: b.ls1(_attend(b, x, g, self.config)))
            if needed is not None and block is self.blocks[-1]:
                break
            packed = _residual(packed, groups, drop_path, lambda x, g, b=block: b.ls2(b.mlp(b.norm2(x))))
        if needed is None:
            parts = self.norm(packed).split([count * length for count, length in groups])
            return [part.view(*group, -1) for part, group in zip(parts, groups, strict=True)]
        packed = packed.index_select(0, needed)
        update = block.ls2(block.mlp(block.norm2(packed)))
        if drop_path:
            kept = torch.zeros(sum(count * length for count, length in groups), 1, device=packed.device)
            rows, scales, _ = _draw_rows(groups, drop_path, packed)
            update = update * kept.index_copy_(0, rows, scales).index_select(0, needed)
        return self.norm(packed + update)


def _attend(block: nn.Module, tokens: Tensor, groups: Groups, config: ModelConfig) -> Tensor:
    query, key, value = block.attn.qkv(block.norm1(tokens)).view(len(tokens), 3, config.heads, -1).unbind(1)
    return block.attn.proj(packed_attention(query, key, value, groups, config.attention).flatten(1))


def _residual(tokens: Tensor, groups: Groups, drop_path: float, branch) -> Tensor:
    """``tokens + branch(tokens)`` in which a random share of each group's sequences skips the branch (and its cost)."""
    if drop_path == 0:
        return tokens + branch(tokens, groups)
    rows, scales, kept_groups = _draw_rows(groups, drop_path, tokens)
    update = branch(tokens.index_select(0, rows), kept_groups) * scales
    return tokens.index_add(0, rows, update.to(tokens.dtype))


def _draw_rows(groups: Groups, drop_path: float, like: Tensor) -> tuple[Tensor, Tensor, Groups]:
    """Rows of the sequences that keep a branch, their scales (rows, 1) and their groups.

    The scale, total / kept, makes the expectation that of the full branch (stochastic depth, Huang et al. 2016, on
    samples as in DINOv2).
    """
    rows, scales, kept_groups, start = [], [], [], 0
    for count, length in groups:
        kept = max(1, int(count * (1 - drop_path)))
        chosen = torch.randperm(count, device=like.device)[:kept].sort().values
        rows.append((start + chosen[:, None] * length + torch.arange(length, device=like.device)).flatten())
        scales.append(like.new_full((kept * length, 1), count / kept))
        kept_groups.append((kept, length))
        start += count * length
    return torch.cat(rows), torch.cat(scales), kept_groups


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: Groups, backend: str = "grouped") -> Tensor:
    """Softmax attention within each sequence of a pack.

    Args:
        query, key, value: (tokens, heads, head_dim).
        groups: (sequences, length) in the order in which they lie in the pack.
        backend: ``grouped`` calls scaled_dot_product_attention once per group and runs everywhere;
            ``varlen`` (torch.nn.attention.varlen) and ``xformers`` make one call, on CUDA in half precision.

    Returns:
        (tokens, heads, head_dim).
    """
    if backend == "grouped":
        # On CPUs the bfloat16 kernel's backward pass takes two to five times as long as the float32 one's.
        dtype = torch.float32 if query.device.type == "cpu" else query.dtype
        parts, start = [], 0
        with torch.autocast(query.device.type, enabled=False):
            for count, length in groups:
                rows = slice(start, start + count * length)
                shape = (count, length, *query.shape[1:])
                # (sequences, heads, length, head_dim)
                q, k, v = (part[rows].view(shape).transpose(1, 2).to(dtype) for part in (query, key, value))
                parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).to(query.dtype))
                start = rows.stop
        return torch.cat(parts)
    lengths = [length for count, length in groups for _ in range(count)]
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
        return varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths))
    if backend == "xformers":
        from xformers.ops import fmha

        bias = fmha.BlockDiagonalMask.from_seqlens(lengths, device=query.device)
        return fmha.memory_efficient_attention(query[None], key[None], value[None], bias)[0]
    raise ConfigError(f"model.attention: unknown backend {backend!r}")


def probe_attention(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Calls a backend forward and backward and compares it with one sequence at a time; None if it works, else why not.

    An import that succeeds proves nothing: xformers imports on machines on which it has no operator.
    """
    groups = [(2, 17), (3, 5)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(49, 2, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    try:
        result = packed_attention(*tensors, groups, backend)
        result.float().sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever a third-party kernel raises is the answer
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    single = [(1, length) for count, length in groups for _ in range(count)]
    expected = packed_attention(*tensors, single)
    error = (result - expected).abs().max().item()
    return None if error <= 2e-2 else f"wrong result, error {error:.1e}"


def resize_position_embedding(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + rows*columns, dim) positions, the class token's first, at another patch grid (bicubic, antialiased)."""
    return resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=1)
