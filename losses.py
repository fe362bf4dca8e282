"""Losses in log space, how to weigh classes, tasks and processes, and which optimizer: each tried fairly.

Measured on two cores of an Intel Xeon (torch 2.13.0, 5 seeds), learning rates chosen on dev: with 200 labels,
20% of them redrawn at random, smoothing 0.1 cuts an overfitted network's calibration error on such labels
from 0.198 to 0.068 (on clean ones 0.086, 0.097), and helps none that was tuned; in 2 dimensions batch-hard
triplets collapse (margin 0.2: 2 seeds, soft: all 5). 43 s for all of it.

    python losses.py                  # the comparisons: tables, pictures, a line of JSON
    python losses.py --n-seeds 10     # every setting is a flag

The papers stand with the functions. Copy what is above "Demo" (part 1: losses, 2: weighting, 3: optimizers);
it needs torch alone.
"""

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# -----------------------------------------------------------------------------
# Part 1, losses. What they share: checks where data enters, float32 for half precision, torch's reductions


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32, as under autocast; the loss comes back as that too."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_class_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Check logits (N, K, ...) against targets (N, ...) and flatten them to R rows, one a prediction.

    Returns log-probabilities (R, K), targets (R,) and which rows count (R,). A row that doesn't count gets
    logits of 0 and target 0: whatever stood there (NaN too) reaches neither value nor gradient.
    """
    if logits.ndim < 2 or not logits.is_floating_point() or logits.shape[1] < 1:
        raise ValueError(f"logits must be floats (N, K, ...), got {logits.dtype} {tuple(logits.shape)}")
    check_integers("targets", targets, logits.shape[:1] + logits.shape[2:])
    n_classes = logits.shape[1]
    targets = targets.long()
    counts = targets != ignore_index
    wrong = counts & ((targets < 0) | (targets >= n_classes))
    if wrong.any():
        allowed = f"0 .. {n_classes - 1} or be ignore_index ({ignore_index})"
        raise ValueError(f"targets must lie in {allowed}, got {targets[wrong][0].item()}")
    logits = full_precision(logits).movedim(1, -1).reshape(-1, n_classes)  # (R, K)
    targets, counts = targets.reshape(-1), counts.reshape(-1)  # (R,)
    log_p = F.log_softmax(logits.masked_fill(~counts[:, None], 0.0), dim=1)
    return log_p, targets.masked_fill(~counts, 0), counts


def check_integers(name: str, values: Tensor, shape: tuple) -> None:
    """Raises ValueError unless values are integers of this shape."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(values.shape)}")


def check_per_class(name: str, values: Tensor | None, log_p: Tensor) -> Tensor | None:
    """Weights, one a class, in the dtype of log_p (R, K)."""
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.shape != log_p.shape[1:]:
        given = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{name} must be a tensor of {log_p.shape[1]} values, one a class, got {given}")
    if not ((values >= 0) & values.isfinite()).all():
        raise ValueError(f"{name} must be finite and >= 0, got {values.tolist()}")
    return values.to(log_p)


def check_at_least_0(name: str, value: float) -> None:
    """Raises ValueError also for NaN and infinity."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def reduce(rows: Tensor, divisor: Tensor, reduction: str, shape: tuple) -> Tensor:
    """rows (R,) -> their sum, sum / divisor, or themselves in shape. A mean over nothing is 0."""
    if reduction == "none":
        return rows.reshape(shape)
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":  # a divisor of 0 becomes infinity: value 0 and gradient 0 instead of 0 / 0
        divisor = divisor.to(rows)
        return rows.sum() / divisor.masked_fill(divisor == 0, math.inf)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def log_mass(log_p: Tensor, mask: Tensor) -> Tensor:
    """log of the probability where mask is True: (..., K) -> (...).

    Where 1 - p would round to 0 (p = 1), its log is still right, and so are its gradients. A floor stands for
    -inf: a logsumexp over nothing but -inf has NaN for a gradient.
    """
    floor = torch.finfo(log_p.dtype).min
    return log_p.clamp(min=floor).masked_fill(~mask, floor).logsumexp(-1)


# Losses on class logits


def label_smoothing_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with the target distribution (1 - smoothing) * one-hot + smoothing / K.

    logits (N, K, ...), targets (N, ...) integers, weight (K,) >= 0. As F.cross_entropy with these: the mean
    with weights divides by the sum of the targets' weights. But for one thing: where no row counts, or those
    that do have weight 0, it is 0 with gradient 0 (torch: NaN). Half precision is computed, and returned, in
    float32.
    Raises ValueError for targets outside 0 .. K - 1 (ignore_index excepted), smoothing outside [0, 1),
    shapes. Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    log_p, y, counts = check_class_rows(logits, targets, ignore_index)  # (R, K), (R,), (R,)
    weight = check_per_class("weight", weight, log_p)
    weighted = log_p if weight is None else log_p * weight
    rows = -(1 - smoothing) * weighted.gather(1, y[:, None]).squeeze(1)  # (R,)
    if smoothing > 0:  # not at 0: a class ruled out by a logit of -inf would give 0 * inf
        rows = rows - smoothing / log_p.shape[1] * weighted.sum(1)
    divisor = counts.sum() if weight is None else (weight[y] * counts).sum()
    return reduce(rows.masked_fill(~counts, 0.0), divisor, reduction, targets.shape)


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss -alpha_y (1 - p_y)^gamma log p_y over a softmax; gamma = 0 without alpha is cross-entropy.

    logits (N, K, ...), targets (N, ...) integers, alpha (K,) a weight a class (one number for all classes
    would only rescale the loss). The mean divides by the number of rows that count, not by their alphas;
    where none does, it is 0. (1 - p)^gamma is exp(gamma log(1 - p)), so gradients are finite at p = 1 for
    every gamma >= 0; the plain power has an infinite slope there for gamma < 1. Half precision is computed
    in float32. Raises ValueError for targets out of range, gamma < 0, shapes. Lin et al. 2017,
    arXiv:1708.02002, eq. 5.
    """
    check_at_least_0("gamma", gamma)
    log_p, y, counts = check_class_rows(logits, targets, ignore_index)  # (R, K), (R,), (R,)
    alpha = check_per_class("alpha", alpha, log_p)
    is_target = F.one_hot(y, log_p.shape[1]).bool()  # (R, K)
    log_p_rest = log_mass(log_p, ~is_target)  # (R,) log(1 - p_y)
    rows = -(gamma * log_p_rest).exp() * log_p.gather(1, y[:, None]).squeeze(1)
    if alpha is not None:
        rows = rows * alpha[y]
    return reduce(rows.masked_fill(~counts, 0.0), counts.sum(), reduction, targets.shape)


def binary_focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = 0.25, reduction: str = "mean"
) -> Tensor:
    """Focal loss over a sigmoid, as torchvision.ops.sigmoid_focal_loss (there alpha comes before gamma, and
    the default reduction is "none"); gamma = 0, alpha = None: plain BCE.

    logits and targets of one shape, targets 0 or 1 (any dtype). alpha weighs class 1, 1 - alpha class 0.
    Raises ValueError for other targets, gamma < 0, alpha outside [0, 1]. Lin et al. 2017, eq. 5.
    """
    check_at_least_0("gamma", gamma)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] or be None, got {alpha}")
    if not logits.is_floating_point() or logits.shape != targets.shape:
        given = f"{logits.dtype} {tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits (floats) and targets must share a shape, got {given}")
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError(f"targets must be 0 or 1, got {targets[(targets != 0) & (targets != 1)][0].item()}")
    z = full_precision(logits)
    positive = (targets == 1).to(z)
    towards_target = (2 * positive - 1) * z  # p_t = sigmoid of this
    losses = -(gamma * F.logsigmoid(-towards_target)).exp() * F.logsigmoid(towards_target)
    if alpha is not None:
        losses = losses * (alpha * positive + (1 - alpha) * (1 - positive))
    return reduce(losses.reshape(-1), torch.tensor(losses.numel()), reduction, logits.shape)


# Losses on embeddings


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, over the last dimension, with gradient 0 where it is 0 (a bare square root: NaN)."""
    squared = (a - b).square().sum(-1)
    apart = squared > 0
    return squared.where(apart, 1.0).sqrt() * apart


def unit(z: Tensor) -> Tensor:
    """z scaled to length 1; a zero vector stays one, with a finite gradient."""
    length = distance(z, torch.zeros_like(z))[..., None]
    return z / length.where(length > 0, 1.0)


def similarity(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Cosine of each row of a (N, D) with each of b (M, D), over the temperature: (N, M). Never in half
    precision, under autocast neither: at temperature 0.07 bfloat16's last digit is 0.05 of a logit."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    with torch.autocast(a.device.type, enabled=False):
        return unit(full_precision(a)) @ unit(full_precision(b)).mT / temperature


def check_embeddings(least: int, **embeddings: Tensor) -> None:
    """Each (N, D), floating point, of the first one's shape and dtype, and at least so many rows."""
    first = next(iter(embeddings.values()))
    for name, z in embeddings.items():
        alike = z.shape == first.shape and z.dtype == first.dtype
        if z.ndim != 2 or not z.is_floating_point() or not alike:
            shapes = ", ".join(f"{n} {tuple(e.shape)} {e.dtype}" for n, e in embeddings.items())
            raise ValueError(f"{name} must be floating point (N, D), all of one kind, got {shapes}")
        if len(z) < least:
            raise ValueError(f"{name} must have at least {least} rows (other ones to compare), got {len(z)}")


def hinge(x: Tensor, margin: float | str) -> Tensor:
    """max(0, x + margin), or with margin "soft" log(1 + e^x), which never stops pulling (Hermans 2017)."""
    if margin == "soft":
        return -F.logsigmoid(-x)
    if isinstance(margin, str):
        raise ValueError(f"margin must be a number >= 0 or 'soft', got {margin!r}")
    check_at_least_0("margin", margin)
    return F.relu(x + margin)


def contrastive_loss(x1: Tensor, x2: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over pairs of d^2 / 2 where same, max(0, margin - d)^2 / 2 elsewhere; d the Euclidean distance.

    x1, x2 (N, D), same (N,) boolean or 0 / 1. Two different samples at one point have gradient 0 (no
    direction leads apart). Raises ValueError for shapes, no pair, a negative margin, other values in same.
    Hadsell et al. 2006, "Dimensionality reduction by learning an invariant mapping", eq. 4.
    """
    check_at_least_0("margin", margin)
    check_embeddings(1, x1=x1, x2=x2)
    if same.shape != x1.shape[:1] or not ((same == 0) | (same == 1)).all():
        raise ValueError(f"same must be {len(x1)} booleans or 0 / 1, got {same.dtype} {tuple(same.shape)}")
    x1, x2 = full_precision(x1), full_precision(x2)
    pull = (x1 - x2).square().sum(1)  # (N,) d^2 itself: no square root to differentiate
    push = F.relu(margin - distance(x1, x2)).square()  # (N,)
    return torch.where(same.bool(), pull, push).mean() / 2


def info_nce_loss(query: Tensor, keys: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of finding key i for query i among all keys, by cosine / temperature.

    Both (N, D), N >= 2. One direction: CLIP's loss is the mean of this and of info_nce_loss(keys, query).
    Raises ValueError for shapes, one pair, temperature <= 0. Van den Oord et al. 2018, arXiv:1807.03748.
    """
    check_embeddings(2, query=query, keys=keys)
    logits = similarity(query, keys, temperature)  # (N, N)
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss: each of the 2N views finds its partner among the 2N - 1 others. z1, z2 (N, D), N >= 2.

    Across processes: nt_xent_loss(gather_batch(z1), gather_batch(z2)); see gather_batch.
    Raises ValueError for shapes, one pair, temperature <= 0. Chen et al. 2020, arXiv:2002.05709, eq. 1.
    """
    check_embeddings(2, z1=z1, z2=z2)
    z = torch.cat((z1, z2))  # (2N, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = similarity(z, z, temperature).masked_fill(itself, -math.inf)  # (2N, 2N)
    partner = torch.arange(len(z), device=z.device).roll(len(z1))  # view i belongs to view i +- N
    return F.cross_entropy(logits, partner)


def supervised_contrastive_loss(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """L_out of supervised contrastive learning: for each anchor the mean, over the others of its class, of
    -log softmax of their similarity among all others; then the mean over anchors.

    z (N, D), N >= 2, labels (N,) integers. An anchor without another of its class is left out (it stays a
    negative for the rest); if that leaves none, the loss is 0 with gradient 0. Without the factor
    temperature / base_temperature of the authors' code. Every label twice: equal to nt_xent_loss.
    Raises ValueError for shapes, one row, temperature <= 0. Khosla et al. 2020, arXiv:2004.11362, eq. 2.
    """
    check_embeddings(2, z=z)
    check_integers("labels", labels, z.shape[:1])
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself  # (N, N)
    log_p = similarity(z, z, temperature).masked_fill(itself, -math.inf).log_softmax(1)
    n_positives = positive.sum(1)  # (N,)
    rows = -log_p.where(positive, 0.0).sum(1) / n_positives.clamp(min=1)  # 0 for an anchor without a positive
    return reduce(rows, (n_positives > 0).sum(), "mean", labels.shape)


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float | str = 1.0) -> Tensor:
    """Mean of max(0, d(anchor, positive) - d(anchor, negative) + margin), Euclidean; all (N, D).

    As F.triplet_margin_loss(eps=0), with gradient 0 instead of NaN at distance 0; margin may be "soft".
    Raises ValueError for shapes, no triplet, a negative margin. Schroff et al. 2015, arXiv:1503.03832, eq. 3
    squares the distances: those tend to collapse (Hermans et al. 2017, section 3.1).
    """
    check_embeddings(1, anchor=anchor, positive=positive, negative=negative)
    anchor, positive, negative = full_precision(anchor), full_precision(positive), full_precision(negative)
    return hinge(distance(anchor, positive) - distance(anchor, negative), margin).mean()


def batch_hard_triplet_loss(
    z: Tensor, labels: Tensor, margin: float | str = 0.2, mining: str = "hard"
) -> Tensor:
    """Triplet loss, mined from one batch: z (N, D) as given (not normalised), labels (N,) integers.

    mining "hard": each anchor with its farthest positive and nearest negative, mean over anchors (Hermans et
    al. 2017, arXiv:1703.07737, eq. 5; margin "soft" is theirs too). "semihard": each (anchor, positive) with
    the nearest negative that is farther away than the positive, mean over pairs that have one (Schroff et al.
    2015, section 3.2). "all": mean over every triplet, those that cost 0 included (Hermans eq. 6). A batch
    without any such triplet costs 0, gradient 0. Hard mining from a bad start may pull everything into one
    point, where the loss stands at the margin (soft: log 2 = 0.6931): has_collapsed tells. Raises ValueError
    for shapes, fewer than 2 rows, a negative margin, another mining. Memory: N^2 D; semihard, all: N^3.
    """
    check_embeddings(2, z=z)
    check_integers("labels", labels, z.shape[:1])
    z = full_precision(z)
    d = distance(z[:, None], z)  # (N, N)
    same = labels[:, None] == labels  # (N, N)
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    if mining == "hard":  # amax and amin share the gradient among ties: the order of the batch plays no part
        exists = positive.any(1) & ~same.all(1)  # (N,)
        hardest = d.masked_fill(~positive, -math.inf).amax(1) - d.masked_fill(same, math.inf).amin(1)
        return reduce(hinge(hardest[exists], margin), exists.sum(), "mean", exists.shape)
    if mining == "semihard":
        farther = ~same[:, None] & (d[:, None] > d[:, :, None])  # (N, N, N): anchor, positive, negative
        nearest = d[:, None].masked_fill(~farther, math.inf).amin(2)  # (N, N)
        exists = positive & farther.any(2)
        return reduce(hinge((d - nearest)[exists], margin), exists.sum(), "mean", exists.shape)
    if mining == "all":
        exists = positive[:, :, None] & ~same[:, None]  # (N, N, N)
        return reduce(hinge((d[:, :, None] - d[:, None])[exists], margin), exists.sum(), "mean", exists.shape)
    raise ValueError(f"mining must be 'hard', 'semihard' or 'all', got {mining!r}")


def has_collapsed(z: Tensor, margin: float | str, share: float = 0.05) -> bool:
    """True where the embeddings z (N, D) have shrunk to a point, and triplet losses stand at the margin:
    the mean distance is below share * margin ("soft" counts as 1)."""
    check_embeddings(2, z=z)
    mean_distance = torch.pdist(full_precision(z)).mean().item()
    margin = 1.0 if margin == "soft" else hinge(torch.zeros(()), margin).item()  # which checks it
    return mean_distance < share * margin


# Design your own: from an idea to a loss to trust
#
# Idea: star ratings. 5 for a true 4 is a small mistake, 1 a large one; cross-entropy charges both the same.
# 1. Write what must be 0 at best, and why. K classes in order are K - 1 yes/no questions, "more than k
#    stars?". The softmax answers each; pay the mean -log p of the right answers (proper scores: lying costs).
# 2. Name the limit that is known: K = 2 leaves one question, which is cross-entropy.
# 3. Compute in log space: sums of probabilities are logsumexps of log-probabilities.
# 4. Then try to refute it. test_all.py holds this loss to the list, as it should any new one:
#    [ ] lower bound: >= 0, and -> 0 when sure and right
#    [ ] direction: a gradient step raises the true class; a mistake farther off costs more, and pulls harder
#    [ ] gradcheck in float64; finite at logits of +-1e4 and in half precision
#    [ ] scale: uniform logits cost 0.5 to 0.7 whatever K (the mean over questions), so rates carry over
#    [ ] limit cases: K = 2 is F.cross_entropy, values and gradients; ignored rows change nothing


def ordinal_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Mean over k = 0 .. K - 2 of -log P(the right one of "class <= k" and "class > k").

    logits (N, K, ...), K >= 2, classes in order; targets (N, ...) integers; reductions as in focal_loss.
    Memory R K^2. Raises ValueError as focal_loss does. The log twin of Epstein's ranked score (1969).
    """
    log_p, y, counts = check_class_rows(logits, targets, ignore_index)  # (R, K), (R,), (R,)
    n_classes = log_p.shape[1]
    if n_classes < 2:
        raise ValueError(f"logits must have at least 2 classes to order, got {n_classes}")
    classes = torch.arange(n_classes, device=y.device)
    low = classes <= classes[:-1, None]  # (K-1, K): the classes on the low side of threshold k
    truth_low = y[:, None] <= classes[:-1]  # (R, K-1)
    right_side = torch.where(truth_low[..., None], low, ~low)  # (R, K-1, K)
    rows = -log_mass(log_p[:, None], right_side).mean(1)  # (R,)
    return reduce(rows.masked_fill(~counts, 0.0), counts.sum(), reduction, targets.shape)


# -----------------------------------------------------------------------------
# Part 2, weighting: classes, tasks, processes


def class_balanced_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """Weights (K,), in proportion (1 - beta) / (1 - beta^n), sum K; counts (K,): n samples a class, >= 1.

    beta = 0 weighs all alike; beta = 1, the limit, by inverse frequency; between them a class's n samples
    count as the (1 - beta^n) / (1 - beta) that are not near-copies of others. In counts' dtype if that is
    floating point. Raises ValueError for a class without samples, beta outside [0, 1].
    Cui et al. 2019, arXiv:1901.05555, eq. 4.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    counts = torch.as_tensor(counts)
    if counts.ndim != 1 or not len(counts) or not (counts >= 1).all():
        raise ValueError(f"counts must be (K,), each at least 1, got {counts.tolist()}")
    n = counts.double()
    if 0 < beta < 1:  # expm1: 1 - beta^n keeps its digits when beta is nearly 1
        effective = torch.expm1(n * math.log(beta)) / (beta - 1)
    else:
        effective = n**beta  # the limits: n, and 1
    weights = len(n) / effective / (1 / effective).sum()
    return weights.to(counts.dtype if counts.is_floating_point() else torch.get_default_dtype())


def check_task_losses(losses: Tensor, n_tasks: int) -> None:
    """Raises ValueError unless losses are (n_tasks,)."""
    if losses.shape != (n_tasks,):
        raise ValueError(f"losses must have the shape ({n_tasks},), one a task, got {tuple(losses.shape)}")


class UncertaintyWeighting(nn.Module):
    """Sum over tasks of (exp(-s_i) L_i + s_i) / 2, s_i = log sigma_i^2 learned with the model (start: 0).

    At the optimum s_i = log L_i: every task pulls with weight 1 / (2 L_i), whatever its unit. No decay on s.
    L_i > 0 is assumed: a loss that can reach 0 (or lie below) drives s_i to -infinity.
    Kendall et al. 2018, arXiv:1705.07115, eq. 7-10.
    """

    def __init__(self, n_tasks: int):
        super().__init__()
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be at least 1, got {n_tasks}")
        self.log_variances = nn.Parameter(torch.zeros(n_tasks))

    def weights(self) -> Tensor:
        return (-self.log_variances).exp() / 2  # (n_tasks,)

    def forward(self, losses: Tensor) -> Tensor:
        """losses (n_tasks,) -> scalar."""
        check_task_losses(losses, len(self.log_variances))
        return (self.weights() * losses + self.log_variances / 2).sum()


class GradNorm(nn.Module):
    """Learns task weights w_i so that the gradient norms G_i = |w_i dL_i/dW| on shared weights W reach
    their target, mean(G) r_i^alpha, where r_i is how much of its first loss task i still has, relative to
    the mean of all tasks.

    alpha = 0 makes all norms equal; more alpha gives the slower task more. Weights stay positive and sum
    to n_tasks as n_tasks * softmax(log_weights) (the paper renormalises after each step: same fixed points,
    but some may turn negative). Put its parameters in an optimizer group of their own, without weight decay,
    e.g. Adam at lr 0.025. The first losses go into the state dict.
    Chen et al. 2018, arXiv:1711.02257, eq. 1-2.
    """

    def __init__(self, n_tasks: int, alpha: float = 1.5):
        super().__init__()
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be at least 1, got {n_tasks}")
        check_at_least_0("alpha", alpha)
        self.alpha = alpha
        self.log_weights = nn.Parameter(torch.zeros(n_tasks))
        self.register_buffer("first_losses", torch.full((n_tasks,), math.nan))  # NaN: not seen yet

    def weights(self) -> Tensor:
        return len(self.log_weights) * self.log_weights.softmax(0)  # (n_tasks,)

    def forward(self, losses: Tensor, shared: Tensor | list[Tensor]) -> Tensor:
        """losses (n_tasks,), shared: the last weights that all tasks use, one tensor or several -> scalar,
        sum of w_i L_i.

        backward() gives the model the gradient of that sum with w held fixed, and log_weights the gradient
        of the balance sum |G_i - target_i| with the model held fixed. Under torch.no_grad() it is that sum
        alone. Raises ValueError if the first losses aren't > 0.
        """
        check_task_losses(losses, len(self.log_weights))
        if not torch.is_grad_enabled():
            return (self.weights() * losses).sum()
        if self.first_losses.isnan().any():
            if not (losses > 0).all():
                raise ValueError(f"losses must be > 0 at first (the measure of progress): {losses.tolist()}")
            self.first_losses.copy_(losses.detach())
        # G_i is linear in w_i, so the norms themselves may be constants: no second derivatives needed
        gradients = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        norms = [torch.cat([g.flatten() for g in of_task]).norm() for of_task in gradients]
        pulls = self.weights() * torch.stack(norms)  # (n_tasks,) G_i
        remaining = (losses.detach() / self.first_losses).clamp(min=0)  # a loss that falls to 0 is done
        relative = remaining / remaining.mean().clamp(min=torch.finfo(remaining.dtype).tiny)
        target = (pulls.mean() * relative**self.alpha).detach()
        balance = (pulls - target).abs().sum()
        return (self.weights().detach() * losses).sum() + balance - balance.detach()


class GatherBatch(torch.autograd.Function):
    """all_gather with its gradient: see gather_batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # all_reduce has no gradient: a second derivative would silently lack it
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()  # in-place below: never on what autograd still holds
        dist.all_reduce(gradient)  # every process's loss depends on this process's rows
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_batch(x: Tensor) -> Tensor:
    """Joins the rows of all processes by rank: (N, ...) -> (world * N, ...). Without a process group: x.

    Gradients flow back to the process that each row came from, summed over the processes' losses (plain
    dist.all_gather drops them: negatives from elsewhere would count in the value alone). So where each
    process computes the loss of the joined batch and gradients are averaged over processes, as DDP does,
    parameters get what one process on the joined batch would give them. Raises ValueError, on all
    processes, where N differs.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    rows = torch.tensor([len(x), -len(x)], device=x.device)
    dist.all_reduce(rows, op=dist.ReduceOp.MAX)
    if rows[0] != -rows[1]:
        raise ValueError(f"x must have as many rows on every process, got {-rows[1]} to {rows[0]}")
    return GatherBatch.apply(x)


# -----------------------------------------------------------------------------
# Part 3, optimization strategies: which parameters, which optimizer, which learning rate when


def parameter_groups(parameters, weight_decay: float) -> list[dict]:
    """Two optimizer groups: matrices, embeddings, convolutions decay; biases and norms (vectors) don't."""
    parameters = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizers(name: str, hidden: list, others: list, lr: float, weight_decay: float) -> list:
    """hidden: the 2-D weights between the first and the last layer; others: every other parameter.

    "sgd" (momentum 0.9) and "adam" add weight_decay * w to the gradient; Adam then divides it by the
    gradient's size, so that it no longer is a decay. "adamw" and "muon" shrink w by lr * weight_decay
    beside the step (Loshchilov & Hutter 2019, arXiv:1711.05101). "muon" steps along the orthogonalised
    momentum of a matrix (Jordan 2024, kellerjordan.github.io/posts/muon), so it gets hidden alone; AdamW
    has the rest.
    """
    if name == "muon":  # match_rms_adamw: steps as large as AdamW's, so that one learning rate serves both
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return [muon, *make_optimizers("adamw", [], others, lr, weight_decay)]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if name not in kinds:
        raise ValueError(f"name must be sgd, adam, adamw or muon, got {name!r}")
    extra = {"momentum": 0.9} if name == "sgd" else {}
    return [kinds[name](parameter_groups([*hidden, *others], weight_decay), lr=lr, fused=True, **extra)]


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate at step 0 .. total - 1: up to 1 in warmup steps, then a cosine to 0, which
    it is from total on (LambdaLR asks for that step, too)."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup)))) / 2


# -----------------------------------------------------------------------------
# Demo: six comparisons. Everything above can be copied without it.
# In a table every row has the same data, start, batches and number of steps, unless its name says otherwise,
# and its own learning rate: the best on dev of a grid that is the same for all rows. The test images are read
# with that one alone.


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


RATES = (0.001, 0.003, 0.01, 0.03)  # the grid of every table but the optimizers', which need a wider one


@dataclass
class Settings:
    n_seeds: int = setting(5, "runs a row, each with its own start, split and batches, for mean and std")
    steps: int = setting(200, "budget of every run; half of it for embeddings, a third for the optimizers")
    batch_size: int = setting(64, "samples a step")
    out: str = setting("out/losses", "pictures and report.json go here")
    seed: int = setting(0, "same seed, same numbers")


class SideBySide(nn.Module):
    """n_seeds independent MLPs, each with its own nn.Linear modules, run as one batched product: as many
    runs at the price of little more than one. x (S, B, sizes[0]) -> (S, B, sizes[-1])."""

    def __init__(self, sizes: tuple, s: Settings):
        super().__init__()
        torch.manual_seed(s.seed)  # every row of a table starts from the same weights
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b) for _ in range(s.n_seeds)) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            weight = torch.stack([linear.weight for linear in layer])  # (S, out, in)
            bias = torch.stack([linear.bias for linear in layer])[:, None]  # (S, 1, out)
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight.mT)
        return x


def digits(s: Settings) -> dict:
    """scikit-learn's 1,797 digits: {"train": (x, y), "dev": ..., "test": ...}, x (S, N, 64), y (S, N).
    The same 500 test images for all seeds; the rest is split anew for each into 1,000 and 297."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(s.seed)
    order = torch.randperm(len(x), generator=generator)
    rest = torch.stack([order[500:][torch.randperm(1297, generator=generator)] for _ in range(s.n_seeds)])
    rows = {"train": rest[:, :1000], "dev": rest[:, 1000:], "test": order[:500].expand(s.n_seeds, -1)}
    return {name: (x[i], y[i]) for name, i in rows.items()}


def fit(
    model: nn.Module, x: Tensor, y: Tensor, loss_of, lr: float, s: Settings, extra=(), prepare=None
) -> nn.Module:
    """s.steps of AdamW on x (S, N, F), y (S, N, ...); returns model. loss_of(outputs, targets, k) is the loss
    of seed k; extra: more optimizer groups; prepare: an augmentation of the inputs (S, B, F)."""
    optimizer = torch.optim.AdamW([*parameter_groups(model.parameters(), 0.01), *extra], lr=lr, fused=True)
    for rows in draw_batches(x.shape[1], s):
        inputs, targets = pick(x, rows), pick(y, rows)
        outputs = model(prepare(inputs) if prepare else inputs)  # (S, B, O)
        losses = [loss_of(outputs[k], targets[k], k) for k in range(s.n_seeds)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # a sum: no seed's gradient touches another's weights
        optimizer.step()
    return model


def tuned(train, dev_score, s: Settings) -> tuple:
    """train(lr) for each of RATES -> what it returned where dev_score of it, (S,), is best on average, and
    that rate, (S,) for the table."""
    results = [train(lr) for lr in RATES]
    scores = [dev_score(result).mean().item() for result in results]
    best = scores.index(max(scores))
    return results[best], torch.full((s.n_seeds,), RATES[best])


def fit_tuned(sizes: tuple, x: Tensor, y: Tensor, loss_of, dev_score, s: Settings, prepare=None) -> tuple:
    """The usual row of a table: a network of these sizes, fitted at its best rate -> that network, rate."""
    return tuned(lambda lr: fit(SideBySide(sizes, s), x, y, loss_of, lr, s, prepare=prepare), dev_score, s)


def draw_batches(n: int, s: Settings):
    """Rows of n samples for each step, (S, B): each seed its own, the same for every row of a table."""
    generator = torch.Generator().manual_seed(s.seed)
    for _ in range(s.steps):
        yield torch.randint(n, (s.n_seeds, s.batch_size), generator=generator)  # (S, B)


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """values (S, N, ...), rows (S, B) -> (S, B, ...): each seed's own rows."""
    return values[torch.arange(len(rows))[:, None], rows]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """logits (S, N, K), y (S, N) -> share that is right, (S,)."""
    return (logits.argmax(-1) == y).double().mean(-1)  # (S,)


def table(title: str, rows: dict[str, dict[str, Tensor]], conclusion: str) -> dict:
    """For the report: mean and standard deviation over seeds of each (S,) value."""
    report = {
        name: {c: [round(v.mean().item(), 4), round(v.std().item(), 4)] for c, v in values.items()}
        for name, values in rows.items()
    }
    return {"title": title, "rows": report, "conclusion": conclusion}


def print_table(table: dict) -> None:
    """Rows by columns, mean ± standard deviation over the seeds, and the conclusion."""
    columns = list(next(iter(table["rows"].values())))
    print(f"\n{table['title']}\n{'':34}" + "".join(f"{c:>18}" for c in columns))
    for name, row in table["rows"].items():
        cells = ["{:.3f} ± {:.3f}".format(*row[c]) if c in row else "" for c in columns]
        print(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"-> (default settings) {table['conclusion']}", flush=True)


def calibration_bins(p: Tensor, y: Tensor, n_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """p (N, K), y (N,) -> by bin of confidence: share of samples, mean confidence, accuracy; (n_bins,)."""
    confidence, guess = p.double().max(-1)
    index = (confidence * n_bins).long().clamp(max=n_bins - 1)
    n = index.bincount(minlength=n_bins)
    sums = [torch.zeros(n_bins).double().index_add(0, index, v) for v in (confidence, (guess == y).double())]
    return n / len(y), sums[0] / n.clamp(min=1), sums[1] / n.clamp(min=1)


def calibration_error(p: Tensor, y: Tensor) -> Tensor:
    """ECE: how far confidence and accuracy lie apart, mean over samples by bin (Guo et al. 2017, eq. 3)."""
    shares, confidence, right = calibration_bins(p, y)
    return (shares * (confidence - right).abs()).sum()


def demo_smoothing(s: Settings) -> tuple[dict, dict]:
    """200 labels, 20% of them redrawn at random; as in real life, so are those of the held-out data."""
    data, generator = digits(s), torch.Generator().manual_seed(s.seed)

    def noisy(y: Tensor) -> Tensor:
        redrawn = torch.rand(y.shape, generator=generator) < 0.2
        return torch.where(redrawn, torch.randint(10, y.shape, generator=generator), y)

    x, y = data["train"][0][:, :200], noisy(data["train"][1][:, :200])
    x_dev, y_dev = data["dev"][0], noisy(data["dev"][1])
    x_test, clean = data["test"]
    y_test, rows, curves = noisy(clean), {}, {}

    def add_row(name: str, model: nn.Module, rate: Tensor) -> None:
        p = model(x_test).detach().softmax(-1)  # (S, 500, 10)
        rows[name] = {"accuracy (clean)": accuracy(p, clean)}
        for column, truth in (("ECE (noisy)", y_test), ("ECE (clean)", clean)):
            rows[name][column] = torch.stack(list(map(calibration_error, p, truth)))
        rows[name] |= {"confidence": p.amax(-1).double().mean(-1), "learning rate": rate}
        curves[name] = calibration_bins(p.flatten(0, 1), y_test.flatten(), 10)

    for smoothing in (0.0, 0.05, 0.1, 0.2, 0.4):

        def loss_of(z: Tensor, t: Tensor, k: int, e: float = smoothing) -> Tensor:
            return label_smoothing_cross_entropy(z, t, e)

        def on_dev(model: nn.Module) -> Tensor:
            return accuracy(model(x_dev), y_dev)

        sizes = (64, 128, 10)
        add_row(f"smoothing {smoothing}", *fit_tuned(sizes, x, y, loss_of, on_dev, s))
        if smoothing in (0.0, 0.1, 0.2):  # not tuned, on purpose: what happens to who trains for too long
            model = fit(SideBySide(sizes, s), x, y, loss_of, 0.01, s)
            add_row(f"overfitted, smoothing {smoothing}", model, torch.full((s.n_seeds,), 0.01))
    conclusion = (
        "At the rate that dev chooses nothing wrong is memorised: smoothing makes the timid more timid. "
        "Overfitted ones are overconfident, and 0.1 cuts that to a third. Measure before you smooth."
    )
    return table("smoothing: 200 training labels, 20% noise", rows, conclusion), curves


def demo_imbalance(s: Settings) -> tuple[dict, dict]:
    """Is it an 8? 17 positives against 850. Test images are weighted to the same 1 : 50."""
    from sklearn import metrics

    data = {name: (x, (y == 8).long()) for name, (x, y) in digits(s).items()}
    x, y = data["train"]
    order = y.argsort(dim=1, descending=True, stable=True)  # the 8s first
    keep = torch.stack([torch.cat((o[:17], o[n : n + 850])) for o, n in zip(order, y.sum(1), strict=True)])
    x, y = pick(x, keep), pick(y, keep)  # (S, 867, 64), (S, 867)
    counts = torch.tensor([850, 17])
    balanced, inverse = class_balanced_weights(counts, 0.99), class_balanced_weights(counts, 1.0)

    def weighted(weight: Tensor):
        return lambda z, t, k: label_smoothing_cross_entropy(z, t, smoothing=0.0, weight=weight)

    ways = {
        "cross-entropy": lambda z, t, k: focal_loss(z, t, gamma=0.0),
        "inverse frequency": weighted(inverse),
        "class-balanced, beta 0.99": weighted(balanced),
        "focal, gamma 2": lambda z, t, k: focal_loss(z, t),
        "focal + class-balanced alpha": lambda z, t, k: focal_loss(z, t, alpha=balanced),
    }

    def weights(t: Tensor) -> Tensor:
        return torch.where(t == 1, 1.0, 50 * t.sum() / (1 - t).sum())

    def margins(model: nn.Module, part: str) -> Tensor:
        return model(data[part][0]).detach().diff(dim=-1)[..., 0]  # (S, N)

    def scores_of(margin: Tensor, part: str, thresholds: Tensor) -> dict:
        columns = ["precision 8", "recall 8", "precision rest", "recall rest", "PR-AUC"]
        values = []
        for m, t, cut in zip(margin, data[part][1], thresholds, strict=True):
            kw = {"sample_weight": weights(t)}
            p, r, *_ = metrics.precision_recall_fscore_support(t, m > cut, zero_division=0, **kw)
            values.append([p[1], r[1], p[0], r[0], metrics.average_precision_score(t, m, **kw)])
        return dict(zip(columns, torch.tensor(values, dtype=torch.float64).T, strict=True))

    def pr_auc_on_dev(model: nn.Module) -> Tensor:
        return scores_of(margins(model, "dev"), "dev", zeros)["PR-AUC"]

    rows, curves, zeros = {}, {}, torch.zeros(s.n_seeds)
    for name, loss_of in ways.items():
        model, rate = fit_tuned((64, 64, 2), x, y, loss_of, pr_auc_on_dev, s)
        margin = margins(model, "test")
        rows[name] = scores_of(margin, "test", zeros) | {"learning rate": rate}
        t = data["test"][1].flatten()
        curves[name] = metrics.precision_recall_curve(t, margin.flatten(), sample_weight=weights(t))[:2]
        if name == "cross-entropy":
            cuts = []  # the plain remedy: leave the loss alone, and move the threshold to the best F1 on dev
            for m, t in zip(margins(model, "dev"), data["dev"][1], strict=True):
                p, r, cut = metrics.precision_recall_curve(t, m, sample_weight=weights(t))
                cuts.append(cut[(2 * p * r / (p + r + 1e-12))[:-1].argmax()])
            moved = scores_of(margin, "test", torch.tensor(cuts)) | {"learning rate": rate}
            rows["cross-entropy, threshold from dev"] = moved
    conclusion = (
        "Weights, alpha and a threshold from dev trade precision for recall along nearly one curve (PR-AUC "
        "within a standard deviation): choose a working point, not a loss. Focal alone doesn't mend recall."
    )
    return table("imbalance 1 : 50, is it an 8?", rows, conclusion), curves


def two_views(x: Tensor) -> Tensor:
    """Each image twice, both times shifted by up to a pixel and with noise: (S, B, 64) -> (S, 2B, 64)."""
    images = F.pad(torch.cat((x, x), dim=1).unflatten(-1, (8, 8)), (1, 1, 1, 1))  # (S, 2B, 10, 10)
    shifts = torch.stack([images[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    choice = torch.randint(9, images.shape[:2])  # (S, 2B), of the (9, S, 2B, 8, 8)
    chosen = shifts.flatten(-2).gather(0, choice[None, ..., None].expand(1, -1, -1, 64))[0]  # (S, 2B, 64)
    return chosen + 0.1 * torch.randn_like(chosen)


def nearest_accuracy(z: Tensor, labels: Tensor, others: Tensor, truth: Tensor) -> Tensor:
    """Share of others (S, N, D) whose class most of their 5 nearest among z (S, M, D) have: (S,)."""
    nearest = torch.cdist(others, z).topk(5, largest=False).indices  # (S, N, 5)
    votes = F.one_hot(pick(labels, nearest.flatten(1)), 10).unflatten(1, (-1, 5)).sum(2)  # (S, N, 10)
    return accuracy(votes, truth)


def demo_embeddings(s: Settings) -> tuple[dict, tuple]:
    """100 labels (NT-Xent: none, but 1,000 images). Score: 5 nearest neighbours among the same 100."""
    (x, y), (x_dev, y_dev), (x_test, y_test) = digits(s).values()
    labelled, labels = x[:, :100], y[:, :100]

    def scores(z: Tensor, z_test: Tensor, margin: float | str) -> dict:
        distances = torch.stack([torch.pdist(one).mean() for one in z_test])
        collapsed = torch.tensor([float(has_collapsed(one, margin)) for one in z_test])
        right = nearest_accuracy(z, labels, z_test, y_test)
        return {"5-NN accuracy": right, "mean distance": distances, "collapsed": collapsed}

    def pairs(z: Tensor, t: Tensor, k: int) -> Tensor:
        return contrastive_loss(z[::2], z[1::2], t[::2] == t[1::2], margin=2.0)

    def mined(margin: float | str, mining: str = "hard"):
        return lambda z, t, k: batch_hard_triplet_loss(z, t, margin, mining)

    few, many = {"x": labelled, "y": labels}, {"x": x, "y": y}
    views = many | {"prepare": two_views}
    s = replace(s, steps=s.steps // 2)
    large = replace(s, batch_size=2 * s.batch_size)
    ways = {  # name: loss, width, margin (None: cosines), data, settings
        "contrastive pairs, margin 2": (pairs, 16, 2.0, few, s),
        "NT-Xent, no labels": (lambda z, t, k: nt_xent_loss(*z.chunk(2)), 16, None, views, s),
        "supervised contrastive": (lambda z, t, k: supervised_contrastive_loss(z, t), 16, None, few, s),
        "triplet semihard 0.2": (mined(0.2, "semihard"), 16, 0.2, few, s),
        "triplet hard 0.2": (mined(0.2), 16, 0.2, few, s),
        "triplet hard soft": (mined("soft"), 16, "soft", few, s),
        "hard 0.2, 1,000 labels, batch x2": (mined(0.2), 16, 0.2, many, large),
        "hard 0.2, the same in 2-D": (mined(0.2), 2, 0.2, many, large),
        "hard soft, the same in 2-D": (mined("soft"), 2, "soft", many, large),
    }
    rows, points = {"raw pixels": scores(labelled, x_test, 1.0)}, {"raw pixels": x_test[0]}
    for name, (loss_of, width, margin, samples, budget) in ways.items():

        def on_dev(model: nn.Module, cosines: bool = margin is None) -> Tensor:
            z, z_dev = model(labelled).detach(), model(x_dev).detach()
            z, z_dev = (unit(z), unit(z_dev)) if cosines else (z, z_dev)
            return nearest_accuracy(z, labels, z_dev, y_dev)

        sizes = (64, 64, width)
        model, rate = fit_tuned(sizes, loss_of=loss_of, dev_score=on_dev, s=budget, **samples)
        z, z_test = model(labelled).detach(), model(x_test).detach()
        if margin is None:  # what a loss on cosines leaves free, the lengths, is not judged
            z, z_test, margin = unit(z), unit(z_test), 1.0
        rows[name] = scores(z, z_test, margin) | {"learning rate": rate}
        if n := int(rows[name]["collapsed"].sum()):
            loss = batch_hard_triplet_loss(z_test[0], y_test[0], margin).item()
            end = f"in {n} of {s.n_seeds} seeds; the loss stands at {loss:.4f}"
            print(f"\n{name}: COLLAPSED to a point {end}", flush=True)
        points[name] = z_test[0]
    conclusion = (
        "Supervised contrastive and triplets beat raw pixels; loose pairs, NT-Xent with weak views, don't. "
        "In 2 dimensions hard mining collapses (see above); the same in 16 dimensions is the best row."
    )
    return table("embeddings from 100 labels, 16-D", rows, conclusion), (points, y_test[0])


def demo_tasks(s: Settings) -> tuple[dict, dict]:
    """Two tasks on one trunk: which digit (cross-entropy, 2.3 at first) and at which height its ink sits,
    in a unit that makes the squared error 400 at first. Chance is accuracy 0.1 and R2 0."""
    height = torch.arange(8.0).repeat_interleave(8)  # of each pixel, from the top
    data = {}
    for part, (x, y) in digits(s).items():
        data[part] = x, torch.stack((y, 50 * ((x * height).sum(-1) / x.sum(-1) - 3.5)), dim=-1)  # (S, N, 2)
    rows = {}
    fixed = {"digit alone": (1, 0), "height alone": (0, 1), "1 : 1": (1, 1), "1 : 1/170": (1, 1 / 170)}

    def scores(model: nn.Module, part: str) -> tuple[Tensor, Tensor]:
        x, y = data[part]
        z = model(x).detach()
        unexplained = (z[..., 10] - y[..., 1]).square().mean(1) / y[..., 1].var(1, correction=0)
        return accuracy(z[..., :10], y[..., 0].long()), 1 - unexplained

    for name in (*fixed, "uncertainty", "GradNorm"):
        weights = fixed.get(name)

        def train(lr: float, name=name, weights=weights) -> nn.Module:
            return train_two_tasks(name, weights, data["train"], lr, s)

        def on_dev(model: nn.Module, weights=weights) -> Tensor:  # of the tasks that this row learns
            tasks = [score for i, score in enumerate(scores(model, "dev")) if not weights or weights[i]]
            return torch.stack(tasks).mean(0)

        model, rate = tuned(train, on_dev, s)
        right, explained = scores(model, "test")
        rows[name] = {"accuracy": right, "R2 of height": explained, "learning rate": rate}
    conclusion = (
        "In a plain sum the larger unit takes all. Dividing by the unit is as good as anything, if known. "
        "GradNorm finds most of the way by itself; uncertainty weights follow the losses, and come late."
    )
    return table("two tasks, losses 1 : 170 at first", rows, conclusion), {}


def train_two_tasks(name: str, fixed: tuple | None, data: tuple, lr: float, s: Settings) -> nn.Module:
    """A model for digit and height at once, under fixed weights or a weighting that is learned with it."""
    kind = {"uncertainty": UncertaintyWeighting, "GradNorm": GradNorm}.get(name)
    weightings = nn.ModuleList(kind(2) for _ in range(s.n_seeds)) if kind else []
    model = SideBySide((64, 64, 64, 11), s)

    def loss_of(z: Tensor, t: Tensor, k: int) -> Tensor:
        digit = label_smoothing_cross_entropy(z[:, :10], t[:, 0].long(), smoothing=0.0)
        both = torch.stack((digit, F.mse_loss(z[:, 10], t[:, 1])))
        if not kind:
            return fixed[0] * both[0] + fixed[1] * both[1]
        return weightings[k](both, model.layers[-2][k].weight) if kind is GradNorm else weightings[k](both)

    own_group = [{"params": weightings.parameters(), "lr": 0.1, "weight_decay": 0.0}] if kind else []
    return fit(model, *data, loss_of, lr, s, extra=own_group)


def train_with(
    name: str, lr: float, data: dict, s: Settings, schedule=False, decay=1e-3, clip=False, ema=False
):
    """One row's run of all seeds -> (model or its average, weight norm of each seed (S,))."""
    model = SideBySide((64, 64, 64, 10), s)
    hidden = [linear.weight for layer in model.layers[1:-1] for linear in layer]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
    optimizers = make_optimizers(name, hidden, others, lr, decay)
    members = [[p for layer in model.layers for p in layer[k].parameters()] for k in range(s.n_seeds)]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95)) if ema else None
    x, y = data["train"]
    for step, rows in enumerate(draw_batches(x.shape[1], s)):
        logits, targets = model(pick(x, rows)).flatten(0, 1), pick(y, rows).flatten()  # (S * B, 10), (S * B,)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr * (warmup_cosine(step, s.steps // 10, s.steps) if schedule else 1.0)
        loss = label_smoothing_cross_entropy(logits, targets, 0.0) * s.n_seeds  # the sum of the seeds' means
        loss.backward()
        if clip:
            for member in members:
                nn.utils.clip_grad_norm_(member, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if ema:
            average.update_parameters(model)
    norms = [torch.cat([p.detach().flatten() for p in member if p.ndim == 2]).norm() for member in members]
    return average if ema else model, torch.stack(norms)


def demo_optimizers(s: Settings) -> tuple[dict, dict]:
    """A third of the steps each. The learning rate is the best on dev of one grid for all; the test images
    are read with that one alone."""
    s = replace(s, steps=max(2, s.steps // 3))
    data, grid, rows, curves = digits(s), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), {}, {}

    def score(model: nn.Module, part: str) -> Tensor:
        x, y = data[part]
        return accuracy(model(x).detach(), y)

    def add_row(label: str, rates: tuple, **options) -> dict:
        runs = [train_with(lr=lr, data=data, s=s, **options) for lr in rates]
        dev = torch.stack([score(model, "dev") for model, _ in runs])  # (rates, S)
        best = dev.mean(1).argmax().item()
        model, norms = runs[best]
        curves[label] = dev.mean(1).tolist()
        rows[label] = {"test": score(model, "test"), "dev": dev[best], "weight norm": norms}
        rows[label] |= {"learning rate": torch.full((s.n_seeds,), rates[best])}
        if len(rates) > 1:
            rows[label]["dev at worst rate"] = dev[dev.mean(1).argmin()]
        return options | {"rates": (rates[best],), "label": label}

    tried = []
    for name in ("sgd", "adam", "adamw", "muon"):
        tried.append(add_row(name, grid, name=name))
        tried.append(add_row(f"{name}, warm-up + cosine", grid, name=name, schedule=True))
    winner = max(tried, key=lambda options: rows[options["label"]]["dev"].mean())
    label = winner.pop("label")
    add_row(f"{label}, clip", **winner, clip=True)
    add_row(f"{label}, EMA", **winner, ema=True)
    add_row(f"{label}, both", **winner, clip=True, ema=True)
    add_row("adam, decay 0.05 in gradient", grid, name="adam", decay=0.05)
    add_row("adamw, decay 0.05 beside it", grid, name="adamw", decay=0.05)
    conclusion = (
        "A schedule helps SGD and Muon by more than the spread; EMA and clipping add less than it. Decay in "
        "Adam's gradient isn't weight decay. No law: a small net on a short budget; try again on yours."
    )
    return table(f"optimizers, {s.steps} steps", rows, conclusion), {"grid": grid, "dev": curves}


def demo_ordinal(s: Settings) -> tuple[dict, dict]:
    """scikit-learn's 442 diabetes patients: progression after a year, in five equal groups as "stars"."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, progress = 20 * torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    y = torch.bucketize(progress, progress.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8]).double()))
    generator = torch.Generator().manual_seed(s.seed)
    order = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(s.n_seeds)])
    train, dev, test = order[:, :240], order[:, 240:300], order[:, 300:]
    rows = {}

    def stars_off(model: nn.Module, part: Tensor) -> Tensor:
        return (model(x[part]).detach().argmax(-1) - y[part]).abs().double()  # (S, N)

    for name, loss in {"cross-entropy": F.cross_entropy, "ordinal": ordinal_loss}.items():

        def loss_of(z: Tensor, t: Tensor, k: int, loss=loss) -> Tensor:
            return loss(z, t)

        def on_dev(model: nn.Module) -> Tensor:
            return -stars_off(model, dev).mean(1)

        model, rate = fit_tuned((10, 32, 5), x[train], y[train], loss_of, on_dev, s)
        off = stars_off(model, test)
        rows[name] = {"accuracy": (off == 0).double().mean(1), "mean stars off": off.mean(1)}
        rows[name] |= {"2 or more off": (off > 1).double().mean(1), "learning rate": rate}
    conclusion = (
        "It passes the checklist, and isn't thereby better: on 442 patients no difference beyond the spread, "
        "not even in far misses, which it charges for. A loss to trust isn't yet a loss to choose."
    )
    return table("design your own: five ordered classes", rows, conclusion), {}


# Pictures: calibration, precision and recall, learning rates; embeddings


def draw(curves: dict, out: Path) -> list[str]:
    """Every picture into out, as PNG; returns their paths."""
    from matplotlib.figure import Figure  # only the demo draws: the functions above need torch alone

    paths = []
    plots = {"smoothing": draw_calibration, "imbalance": draw_precision_recall, "optimizers": draw_rates}
    for name, plot in (plots | {"embeddings": draw_embeddings}).items():
        size = (12, 5.4) if name == "embeddings" else (7, 4.5)
        figure, png = Figure(figsize=size, layout="constrained"), io.BytesIO()
        plot(figure, curves[name])
        figure.savefig(png, format="png", dpi=100)
        write_atomically(out / f"{name}.png", png.getvalue())
        paths.append(str(out / f"{name}.png"))
    return paths


def draw_calibration(figure, curves: dict) -> None:
    """Accuracy against confidence, in bins."""
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), "k--", linewidth=0.8, label="calibrated")
    for name, (share, confidence, right) in curves.items():
        filled = share > 0.01  # emptier bins are noise
        axes.plot(confidence[filled], right[filled], "o-", markersize=4, label=name)
    axes.set(xlabel="confidence", ylabel="accuracy", title="Reliability on held-out data, 20% wrong labels")
    axes.legend(fontsize=8)


def draw_precision_recall(figure, curves: dict) -> None:
    """Precision against recall of the rare class."""
    axes = figure.subplots()
    for name, (precision, recall) in curves.items():
        axes.plot(recall, precision, linewidth=1.2, label=name)
    axes.set(xlabel="recall of 8", ylabel="precision of 8", title="1 : 50: the losses share one curve")
    axes.legend(fontsize=8)


def draw_rates(figure, curves: dict) -> None:
    """Dev accuracy of each optimizer over its learning rates."""
    axes = figure.subplots()
    colours = {"sgd": "tab:blue", "adam": "tab:orange", "adamw": "tab:green", "muon": "tab:red"}
    for name, dev in curves["dev"].items():
        if len(dev) > 1 and "decay" not in name:
            style, colour = "o-" if "cosine" in name else "o:", colours[name.split(",")[0]]
            axes.semilogx(curves["grid"], dev, style, markersize=4, color=colour, label=name)
    axes.set(xlabel="learning rate", ylabel="accuracy on dev", title="After a short budget, mean of seeds")
    axes.legend(fontsize=8)


def draw_embeddings(figure, curves: tuple) -> None:
    """Seed 0's test images: first two principal components, axes in the embedding's own unit."""
    points, y = curves
    for axes, (name, z) in zip(figure.subplots(2, 5).flat, points.items(), strict=True):
        z = z - z.mean(0)
        flat = z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T  # (500, 2)
        reach = max(flat.abs().max().item(), 0.2)  # never narrower than the margin: a collapse looks like one
        axes.scatter(*flat.T, c=y, cmap="tab10", s=4)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        axes.set_xlabel("component 1", fontsize=7)
        axes.set_ylabel("component 2", fontsize=7)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)


# -----------------------------------------------------------------------------


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for f in fields(Settings):
        reason = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default, help=reason)
    s = Settings(**vars(parser.parse_args(argv)))
    if s.n_seeds < 2:
        raise ValueError(f"n_seeds must be at least 2 (tables show a spread), got {s.n_seeds}")
    if s.steps < 6:
        raise ValueError(f"steps must be at least 6, got {s.steps}")
    if s.batch_size < 4 or s.batch_size % 2:
        raise ValueError(f"batch_size must be even (pairs are made of it) and at least 4, got {s.batch_size}")
    return s


def gemm_gflops() -> float:
    """fp32 1024^3 matmul, median of 7: what this CPU gives at best, so that seconds can be compared."""
    a, times = torch.randn(1024, 1024), []
    for _ in range(7):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return round(2 * 1024**3 / sorted(times)[3] / 1e9, 1)


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def run(demo, s: Settings) -> bytes:
    """In a process of its own. Pickled here: torch's own way between processes keeps a file open a tensor."""
    torch.set_num_threads(1)
    return pickle.dumps(demo(s))


def main() -> None:
    s = settings_from_command_line()
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # before the work: a place that can't be written is known at once
    torch.set_num_threads(1)  # matrices of 64 x 64: a second process, below, brings more than a second thread
    machine = {"torch": torch.__version__, "threads": 1, "gemm_gflops": gemm_gflops()}
    machine["cpu"] = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(" ".join(f"{k}={v}" for k, v in (asdict(s) | machine).items()), "device=cpu dtype=float32")
    import matplotlib  # noqa: F401  needed at the end: a missing one is known at once

    start, tables, curves = time.perf_counter(), {}, {}
    demos = (demo_smoothing, demo_imbalance, demo_embeddings, demo_tasks, demo_optimizers, demo_ordinal)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for demo, result in zip(demos, pool.map(run, demos, [s] * len(demos)), strict=True):
            name = demo.__name__.removeprefix("demo_")
            tables[name], curves[name] = pickle.loads(result)
            print_table(tables[name])
    pictures = draw(curves, out)
    report = {"tables": tables, "pictures": pictures, "settings": asdict(s)} | machine
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend: one line, no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = "scikit-learn" if error.name == "sklearn" else error.name
        print(f"{Path(__file__).name}: the demo needs {package}: pip install {package}", file=sys.stderr)
        sys.exit(2)
