"""The encoder: timm's Vision Transformer with one input channel, a mask token and packed crops.

``forward_packed`` runs crops of different sizes through the blocks in one pass: tokens of all sequences lie in one
(tokens, dim) matrix for norms, projections and MLPs, and only attention looks at sequence borders. A group is
(sequences, length): sequences of one length that lie one after the other. Outside training ``forward_features``
computes the same.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_depth.compiled import compiled, is_compiling, vary
from dino_depth.config import ModelConfig
from dino_depth.errors import ConfigError
from dino_depth.rotary import rotate, rotation

__all__ = ["DepthTransformer", "packed_attention", "probe_attention", "resize_position_embedding"]

LENGTH_OF_PRODUCTS = 512  # tokens of a sequence up to which attention on a CPU may hold all its scores

Groups = list[tuple[int, int]]
Taken = tuple[Tensor, list[Tensor]]  # rows of the pack that take a branch, and of each group the sequences they are of


class Float32PatchEmbed(PatchEmbed):
    """Patches to tokens in float32, whatever autocast or the GPU's default for convolutions (TF32) would round to.

    Depth is the one input whose last bits are signal: in bfloat16 a height of .1 m comes in steps of half a
    millimetre, and no later layer brings back what was rounded here. It is a hundredth of the work.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, height, width) of any type to (batch, rows, columns, dim) float32, or float64 as given."""
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class DepthTransformer(VisionTransformer):
    """ViT with a class token for (batch, 1, height, width) depth.

    Tokens lie in the order class, registers, patches. With registers, learned positions are those of the patches alone.

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
        if config.registers < 0:
            raise ConfigError(f"model.registers must not be negative, got {config.registers}")
        if config.positions == "rotary" and config.dim // config.heads % 4:
            raise ConfigError(
                f"model.positions rotary: model.dim {config.dim} over model.heads {config.heads} is no multiple of 4"
            )
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
            pos_embed="learn" if config.positions == "learned" else "none",
            reg_tokens=config.registers,
            embed_layer=Float32PatchEmbed,
            no_embed_class=config.registers > 0,
        )
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))
        if config.registers or config.positions == "rotary":
            # Without a position to tell them apart, tokens that begin at nearly 0 would all but begin equal.
            for token in filter(lambda token: token is not None, (self.cls_token, self.reg_token)):
                nn.init.trunc_normal_(token, std=0.02)
        if config.initialization == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens (batch, class and registers and patches, dim) of images (batch, 1, height, width).

        Args:
            masks: (batch, patches) bool; those patches become the mask token.
        """
        patches = self.patch_embed(images)  # (batch, rows, columns, dim)
        if masks is not None:
            masks = masks.view(*patches.shape[:3], 1)
            patches = torch.where(masks, self.mask_token.to(patches.dtype), patches)
        return self._pos_embed(patches)

    def forward_features(self, x: Tensor, **arguments) -> Tensor:
        """Normalised tokens (batch, class and registers and patches, dim) of images (batch, 1, height, width)."""
        if self.config.positions == "learned":
            return super().forward_features(x, **arguments)
        return self.forward_packed([x], [None])[0]

    def forward_packed(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None],
        needed: Tensor | None = None,
        kept: list[list[Tensor]] | None = None,
        scale: float = 1.0,
    ) -> list[Tensor] | Tensor:
        """Normalised tokens of several sets of crops in one pass.

        Args:
            crops: each (batch_i, 1, side_i, side_i).
            masks: for each, (batch_i, patches_i) bool or None.
            needed: (rows,) of the pack that the caller reads. The last block's MLP, a twentieth of the work, then
                leaves out the others.
            kept: for each residual branch (two a block) and each set, (kept,) the sequences that take it; the others
                skip it and its cost. None: all take every branch.
            scale: of a branch's output where it is taken, 1 / share kept.

        Returns:
            for each set, (batch_i, tokens_i, dim) as of :meth:`embed`; with ``needed``, (rows, dim).
        """
        tokens = [self.embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        groups = [(part.shape[0], part.shape[1]) for part in tokens]
        packed = torch.cat([part.flatten(0, 1) for part in tokens])  # (tokens, dim)
        rotations = None if self.config.positions == "learned" else [self._rotation(images) for images in crops]
        rows = None if kept is None else _rows(groups, kept)
        ends = _ends(groups, packed.device) if self.config.attention == "varlen" else None
        run = _recomputed if self.config.checkpoint_activations else _run
        # What is computed again needs its input, and a compiled unit is given none to change.
        in_place = not self.config.checkpoint_activations and not is_compiling()
        for place, block in enumerate(self.blocks):
            attention, mlp = (None, None) if rows is None else rows[2 * place : 2 * place + 2]
            packed = run(
                _attention_residual, block, packed, groups, attention, scale, rotations, ends, self.config, in_place
            )
            if needed is not None and block is self.blocks[-1]:
                break
            packed = run(_mlp_residual, block, packed, groups, mlp, scale, in_place)
        if needed is None:
            parts = self.norm(packed).split([count * length for count, length in groups])
            return [part.view(*group, -1) for part, group in zip(parts, groups, strict=True)]
        taken = torch.ones(len(packed), 1, device=packed.device)
        if mlp is not None:
            taken = torch.zeros_like(taken).index_fill_(0, mlp[0], scale)
        packed, taken = packed.index_select(0, needed), taken.index_select(0, needed)
        vary(packed, taken)
        return self.norm(_mlp_of_rows(block, packed, taken))

    def _rotation(self, images: Tensor) -> Tensor:
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        return rotation((rows, columns), self.num_prefix_tokens, self.config.dim // self.config.heads, images.device)


def _attend(
    block: nn.Module,
    tokens: Tensor,
    groups: Groups,
    scale: float,
    rotations: list[Tensor] | None,
    ends: list[Tensor] | None,
    config: ModelConfig,
) -> Tensor:
    shape = (len(tokens), 3, config.heads, config.dim // config.heads)
    query, key, value = block.attn.qkv(block.norm1(tokens)).view(shape).unbind(1)
    if rotations is not None:
        query, key = (rotate(part, groups, rotations) for part in (query, key))
    attended = packed_attention(query, key, value, groups, config.attention, ends).flatten(1)
    return _scaled_linear(attended, block.attn.proj, block.ls1.gamma * scale)


def _mlp(block: nn.Module, tokens: Tensor, scale: float = 1.0) -> Tensor:
    hidden = block.mlp.act(block.mlp.fc1(block.norm2(tokens)))
    return _scaled_linear(hidden, block.mlp.fc2, block.ls2.gamma * scale)


def _scaled_linear(tokens: Tensor, layer: nn.Linear, gain: Tensor) -> Tensor:
    """``gain * layer(tokens)``: scaling the weights, of which there are few, costs less than scaling the tokens."""
    return F.linear(tokens, layer.weight * gain[:, None], layer.bias * gain)


def _run(residual, *arguments) -> Tensor:
    return residual(*arguments)


def _recomputed(residual, *arguments) -> Tensor:
    """The backward pass computes the residual branch again instead of keeping what lies inside it."""
    # Nothing inside is random: who keeps a branch is decided outside.
    return checkpoint(residual, *arguments, use_reentrant=False, preserve_rng_state=False)


@compiled
def _attention_residual(
    block: nn.Module,
    tokens: Tensor,
    groups: Groups,
    kept: Taken | None,
    scale: float,
    rotations: list[Tensor] | None,
    ends: list[Tensor] | None,
    config: ModelConfig,
    in_place: bool,
) -> Tensor:
    return _residual(lambda x, g: _attend(block, x, g, scale, rotations, ends, config), tokens, groups, kept, in_place)


@compiled
def _mlp_residual(
    block: nn.Module, tokens: Tensor, groups: Groups, kept: Taken | None, scale: float, in_place: bool
) -> Tensor:
    return _residual(lambda x, _: _mlp(block, x, scale), tokens, groups, kept, in_place)


@compiled
def _mlp_of_rows(block: nn.Module, tokens: Tensor, taken: Tensor) -> Tensor:
    """``taken`` (rows, 1) is the scale of the branch of each row, 0 where it is skipped."""
    return tokens + _mlp(block, tokens) * taken


def _residual(branch, tokens: Tensor, groups: Groups, kept: Taken | None, in_place: bool = False) -> Tensor:
    """``tokens + branch(tokens)``, the branch computed for the ``kept`` sequences of each group alone.

    Args:
        in_place: whether ``tokens`` may be overwritten: nothing computes from them again.
    """
    if kept is None:
        update = branch(tokens, groups)
        # The branch's norm keeps what it saw for its gradient.
        return tokens.add_(update) if in_place and not torch.is_grad_enabled() else tokens + update
    rows, chosen = kept
    kept_groups = [(len(part), length) for part, (_, length) in zip(chosen, groups, strict=True)]
    if not in_place:
        update = branch(tokens.index_select(0, rows), kept_groups)
        return tokens.index_add(0, rows, update.to(tokens.dtype))
    taken, tokens = _TakenRows.apply(tokens, rows)
    return tokens.index_add_(0, rows, branch(taken, kept_groups).to(tokens.dtype))


class _TakenRows(torch.autograd.Function):
    """``tokens`` and ``rows`` of them, whose gradient is added in place to the one that passes by.

    That one comes from what was added to ``tokens`` later, and nobody else has it. torch would fill zeros, add the
    rows' gradient to them and both together: four passes over all tokens.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.mark_dirty(tokens)
        return tokens.index_select(0, rows), tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_rows: Tensor, of_tokens: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return of_tokens.index_add_(0, rows, of_rows), None


def _rows(groups: Groups, kept: list[list[Tensor]]) -> list[Taken]:
    """For each branch, (rows,) of the pack that belong to its ``kept`` sequences of each group, and these.

    All branches together: a few kernels, where each branch by itself would launch a dozen.
    """
    sets, start = [], 0
    for place, (count, length) in enumerate(groups):
        chosen = [branch[place] for branch in kept]
        first = start + length * torch.cat(chosen)  # of every kept sequence
        rows = first[:, None] + torch.arange(length, device=first.device)
        sets.append(rows.split([len(part) for part in chosen]))
        start += count * length
    found = [torch.cat([part.flatten() for part in parts]) for parts in zip(*sets, strict=True)]
    vary(*found)
    return list(zip(found, kept, strict=True))


def _ends(groups: Groups, device: torch.device) -> list[Tensor]:
    """For each group, (sequences + 1,) int32 tokens after none, one, two ... of its sequences.

    Counted on the device: a copy from the host would wait for everything before it.
    """
    return [length * torch.arange(count + 1, dtype=torch.int32, device=device) for count, length in groups]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    backend: str = "grouped",
    ends: list[Tensor] | None = None,
) -> Tensor:
    """Softmax attention within each sequence of a pack.

    Args:
        query, key, value: (tokens, heads, head_dim).
        groups: (sequences, length) in the order in which they lie in the pack.
        backend: ``grouped`` calls scaled_dot_product_attention once per group and runs everywhere;
            ``varlen`` (torch.nn.attention.varlen) and ``xformers`` make one call, on CUDA in half precision.
        ends: for ``varlen``, of each group, of so many sequences or more, :func:`_ends`, if they are there already.

    Returns:
        (tokens, heads, head_dim).
    """
    if backend == "grouped":
        # On CPUs the bfloat16 kernel's backward pass is the slowest, and separate products of bfloat16 are the fastest,
        # but their memory is the square of the length; docs/performance.md.
        on_cpu, results, sizes = query.device.type == "cpu", [], [count * length for count, length in groups]
        with torch.autocast(query.device.type, enabled=False):
            for (count, length), *parts in zip(
                groups, *(part.split(sizes) for part in (query, key, value)), strict=True
            ):
                shape = (count, length, *query.shape[1:])
                products = on_cpu and query.dtype == torch.bfloat16 and length <= LENGTH_OF_PRODUCTS
                dtype = torch.float32 if on_cpu and not products else query.dtype
                # (sequences, heads, length, head_dim)
                q, k, v = (part.view(shape).transpose(1, 2).to(dtype) for part in parts)
                attention = _attention_by_products if products else F.scaled_dot_product_attention
                results.append(attention(q, k, v).transpose(1, 2).flatten(0, 1).to(query.dtype))
        return torch.cat(results)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        ends, start, borders = ends or _ends(groups, query.device), 0, []
        for (count, length), part in zip(groups, ends, strict=True):
            borders.append(start + part[bool(borders) : count + 1])
            start += count * length
        borders, longest = torch.cat(borders), max(length for _, length in groups)
        return varlen_attn(query, key, value, borders, borders, longest, longest)
    if backend == "xformers":
        from xformers.ops import fmha

        lengths = [length for count, length in groups for _ in range(count)]
        bias = fmha.BlockDiagonalMask.from_seqlens(lengths, device=query.device)
        return fmha.memory_efficient_attention(query[None], key[None], value[None], bias)[0]
    raise ConfigError(f"model.attention: unknown backend {backend!r}")


def _attention_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


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
    """(1, rows*columns, dim) positions, or those behind the class token's, at another grid (bicubic, antialiased)."""
    prefix = position.shape[1] - math.isqrt(position.shape[1]) ** 2  # the stored grid is square
    return resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=prefix)
