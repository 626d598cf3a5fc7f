"""Section 3 of SGANet (Bai et al. 2026), equation by equation. Its formulas are lost: these are rebuilt from its words.

A view is its cells' features by modality, {"image": (P, C), "depth": (P, C)}, the same cells in both. Views may differ
in their numbers of cells, so an instance is a list of views. What has a tilde in the paper is ``refined`` here.

Nothing has to be as large as the paper's words suggest. Frozen features let equations 4 to 6 be read as

    q.k = (f_i W_Q W_K') . f_j        sum of a val = (sum of a f_j) W_V

so keys and values are never computed, gathered features need no gradient, and what is gathered lives for a block.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Refinement", "candidates", "comparable", "contrast", "differences", "geometric_loss", "losses", "neighbourhood",
    "select", "successors", "unit",
]  # fmt: skip

Cells = dict[str, Tensor]  # of one view: by modality, (cells, channels)
Adjacency = Literal["sequence", "sequence+wrap", "ring", "angle"]
# Entries of one block of similarities or of gathered features: 64 MiB.
BLOCK = 2**24
ZERO = 1e-6  # a vector shorter than this has no direction


def unit(features: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one, so that its cosine with anything is 0."""
    return F.normalize(features, dim=-1, eps=ZERO)


# 3.3 Selective cross-view feature refinement


def neighbourhood(
    adjacency: Adjacency, views: int, reach: int, ring: int = 12, axes: Tensor | None = None
) -> list[list[int]]:
    """Equation 14, and with a reach of 1 the adjacent views A(v): of each view the others near it, nearest first.

    Args:
        reach: views on either side.
        ring: views that one turn around the object has, where ``adjacency`` is ``ring``.
        axes: (views, 3) optical axes, where ``adjacency`` is ``angle``: the 2 * reach nearest in angle.
    """
    if adjacency == "angle":
        # Rounded, so that equal angles are told apart by their order alone.
        cosines = (unit(axes) @ unit(axes).T).mul(1e6).round()
        cosines.fill_diagonal_(-torch.inf)
        order = cosines.sort(dim=1, descending=True, stable=True).indices
        return [row[: min(2 * reach, views - 1)] for row in order.tolist()]
    steps = [sign * step for step in range(1, reach + 1) for sign in (1, -1)]
    return [
        list(dict.fromkeys(u for step in steps if (u := _walk(adjacency, views, ring, v, step)) not in (None, v)))
        for v in range(views)
    ]


def successors(adjacency: Adjacency, views: int, ring: int = 12, axes: Tensor | None = None) -> list[int | None]:
    """The next view of each, which equation 9 takes differences to; None where there is none."""
    if adjacency == "angle":
        return [near[0] for near in neighbourhood(adjacency, views, 1, ring, axes)]
    following = [_walk(adjacency, views, ring, v, 1) for v in range(views)]
    return [None if u == v else u for v, u in enumerate(following)]


def _walk(adjacency: Adjacency, views: int, ring: int, view: int, step: int) -> int | None:
    """The view that lies so many places on."""
    if adjacency == "sequence":
        return view + step if 0 <= view + step < views else None
    around = ring if adjacency == "ring" else views
    start = view // around * around
    return start + (view - start + step) % around


def comparable(view: Cells, modality: str, alpha: float) -> Tensor:
    """(P, C) vectors whose inner products are equation 1: alpha cos(own) + (1 - alpha) cos(the other modality)."""
    own = unit(view[modality])
    other = [unit(features) for name, features in view.items() if name != modality]
    return torch.cat([alpha**0.5 * own, (1 - alpha) ** 0.5 * other[0]], 1) if other else own


def select(query: Tensor, offered: Tensor, count: int) -> Tensor:
    """Equation 2: of each query the cells of another view that are most similar to it, (P, K) in ascending order.

    Args:
        query: (P, C), and ``offered``: (P', C), both of ``comparable``.
        count: K; all cells if there are no more.
    """
    count = min(count, len(offered))
    if count == 0:
        return torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    rows = max(1, BLOCK // len(offered))
    return torch.cat([_largest(part @ offered.T, count) for part in query.split(rows)])


def _largest(values: Tensor, count: int) -> Tensor:
    """Columns (rows, count) of the largest values, ascending; of equal values the first."""
    least = values.topk(count).values[:, -1:]
    above, level = values > least, values == least
    room = count - above.sum(1, keepdim=True)
    if (level.sum(1, keepdim=True) != room).any():
        level &= level.cumsum(1) <= room
    return (above | level).nonzero()[:, 1].view(-1, count)


def candidates(query: Tensor, offered: Sequence[Tensor], adjacent: Sequence[int], count: int) -> Tensor:
    """Equation 3: the selected cells of all adjacent views, (P, M) places among the cells of all views in their order.

    Args:
        query: (P, C), and ``offered``: (P', C) of every view, all of ``comparable``.
    """
    starts = [0]
    for part in offered:
        starts.append(starts[-1] + len(part))
    return torch.cat([starts[u] + select(query, offered[u], count) for u in adjacent], 1)


class _Mixture(torch.autograd.Function):
    """Equations 5 and 6 before W_V: the mean of the gathered rows, weighed by the softmax of their logits.

    ``apply(query (P, C), rows (N, C), index (P, M), scale)`` gives (P, C); of the arguments only ``query`` has a
    gradient, since rows are frozen features.
    """

    @staticmethod
    def forward(context, query, rows, index, scale):
        mixed, weights = torch.empty_like(query), query.new_empty(index.shape)
        for part in _blocks(index, rows):
            near = rows[index[part]]  # (block, M, C)
            logits = torch.einsum("pmc,pc->pm", near, query[part])
            weights[part] = (scale * logits).softmax(1)
            mixed[part] = torch.einsum("pm,pmc->pc", weights[part], near)
        context.save_for_backward(rows, index, weights)
        context.scale = scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        rows, index, weights = context.saved_tensors
        result = torch.empty_like(gradient)
        for part in _blocks(index, rows):
            near, weight = rows[index[part]], weights[part]
            change = torch.einsum("pmc,pc->pm", near, gradient[part])
            change = weight * (change - (weight * change).sum(1, keepdim=True))
            result[part] = context.scale * torch.einsum("pm,pmc->pc", change, near)
        return result, None, None, None


def _blocks(index: Tensor, rows: Tensor) -> list[slice]:
    size = max(1, BLOCK // max(1, index.shape[1] * rows.shape[1]))
    return [slice(start, start + size) for start in range(0, len(index), size)]


class Refinement(nn.Module):
    """Cross-view attention of one modality (equations 4 to 6).

    Args:
        dim: channels C.
        start: of the matrices: ``identity`` makes the module average what it selects, ``xavier`` is uniform.
        heads: of the attention; they share the channels evenly.
        residual: the cell's own feature is kept beside what the neighbours show.
        norm: a layer norm without weights at the end.
    """

    def __init__(self, dim: int, start: str = "identity", heads: int = 1, residual: bool = True, norm: bool = False):
        super().__init__()
        self.heads, self.residual, self.norm = heads, residual, norm
        self.query, self.key, self.value = (nn.Parameter(torch.eye(dim)) for _ in range(3))
        if start == "xavier":
            for matrix in self.parameters():
                nn.init.xavier_uniform_(matrix)

    def forward(self, features: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Refined features (P, C) of one view's ``features`` (P, C).

        Args:
            rows: (N, C) frozen features that ``index`` (P, M) chooses from; M may be 0, at the end of a sequence whose
                neighbour shows nothing.
        """
        mixed = []
        width = features.shape[1] // self.heads
        for part in (slice(head * width, (head + 1) * width) for head in range(self.heads)):
            query = features @ self.query[:, part] @ self.key[:, part].T
            mixed.append(_Mixture.apply(query, rows, index, width**-0.5) @ self.value[:, part])
        refined = torch.cat(mixed, 1) if self.heads > 1 else mixed[0]
        refined = features + refined if self.residual else refined
        return F.layer_norm(refined, refined.shape[1:]) if self.norm else refined


# 3.4 Semantic-structural patch alignment


def contrast(image: Tensor, depth: Tensor, temperature: float, symmetric: bool = False) -> Tensor:
    """Equations 7 and 8, and of differences 10 and 11: InfoNCE, whose positive pair is the same cell in the other one.

    Args:
        image: (P, C), and ``depth``: (P, C).
        symmetric: the mean of both directions; the paper's words have only that from the image to depth.
    """
    logits = unit(image) @ unit(depth).T / temperature  # (P, P)
    same = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, same)
    return (loss + F.cross_entropy(logits.T, same)) / 2 if symmetric else loss


def differences(view: Cells, following: Cells, pairs: tuple[Tensor, Tensor]) -> Cells:
    """Equation 9: of pairs of cells (i of a view, j of the next one), what changes, (n, C) by modality.

    Cells that show no change in a modality are left out: the direction of nothing is noise.
    """
    found = {name: following[name][pairs[1]] - view[name][pairs[0]] for name in view}
    with torch.no_grad():
        scales = {name: features[pairs[0]].norm(dim=1).mean() for name, features in view.items()}
        kept = torch.stack([part.norm(dim=1) > 1e-3 * scales[name] for name, part in found.items()]).all(0)
    return {name: part[kept] for name, part in found.items()}


# 3.5 Multi-view geometric alignment


def geometric_loss(
    view: Tensor, other: Tensor, pairs: tuple[Tensor, Tensor], distance: str = "squared", length_one: bool = True
) -> Tensor:
    """Equation 15: mean distance of the features of cells that show the same place.

    Args:
        view: (P, C), and ``other``: (P', C) of the neighbouring view.
        pairs: cells i and j, (n,) each; n must not be 0.
        distance: ``squared`` or ``euclidean``, or ``cosine`` for one minus it.
        length_one: features have length 1 before they are compared, so that the loss does not depend on their scale.
    """
    first, second = view[pairs[0]], other[pairs[1]]
    if length_one or distance == "cosine":
        first, second = unit(first), unit(second)
    squares = (first - second).square().sum(1)
    if distance == "euclidean":
        return (squares + ZERO**2).sqrt().mean()
    return (squares / 2 if distance == "cosine" else squares).mean()


def lean(function: Callable[..., Tensor], *arguments) -> Tensor:
    """``function(*arguments)`` whose intermediates are computed again for the gradient: no (P, P) matrix is kept."""
    return checkpoint(function, *arguments, use_reentrant=False)


# 3.6 Learning and scoring: 17 to 19 are the loop and the score of the head


def losses(
    refined: Sequence[Cells],
    following: Sequence[tuple[int, tuple[Tensor, Tensor]] | None],
    matched: dict[tuple[int, int], tuple[Tensor, Tensor]],
    terms: dict[str, Callable[..., Tensor]],
) -> dict[str, Tensor]:
    """Equations 12, 13 and 16: every loss as its mean over views, or over pairs of views and modalities.

    Args:
        refined: of every view.
        following: of every view the next one and the pairs of cells whose difference equation 9 takes; None for none.
        matched: pairs of cells C_vu by (v, u), none of them empty.
        terms: ``semantic`` and ``structural`` of (image, depth), ``geometric`` of (view, other, pairs); some of them.

    Returns:
        Those of ``terms`` that some view has a part in.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in terms}
    for v, view in enumerate(refined):
        if "semantic" in terms:
            parts["semantic"].append(lean(terms["semantic"], view["image"], view["depth"]))
        if "structural" in terms and following[v] is not None:
            u, pairs = following[v]
            change = differences(view, refined[u], pairs)
            if len(change["image"]):
                parts["structural"].append(lean(terms["structural"], change["image"], change["depth"]))
    if "geometric" in terms:
        for (v, u), pairs in matched.items():
            for name in refined[v]:
                parts["geometric"].append(lean(terms["geometric"], refined[v][name], refined[u][name], pairs))
    return {name: torch.stack(found).mean() for name, found in parts.items() if found}
