"""Attention four ways, from a loop that anyone can check to the fused kernel, and pictures of its weights.

On one CPU core (torch 2.13.0): demo 10 s; an induction head puts 98% of its weight on the right key; T = 4096
takes 198 MB written out, 11 MB blockwise, 7 MB fused. On two cores MultiHeadAttention trains 1.3 times as
fast as nn.MultiheadAttention (B=32, T=256, d_model=256, 8 heads).

    python attention.py                  # demo: masks, agreement, a trained induction head, memory and time
    python attention.py --benchmark      # MultiHeadAttention against nn.MultiheadAttention

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762 (eq. 1, section 3.2.2). Blockwise: Milakov
and Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao 2023, "FlashAttention-2", arXiv:2307.08691
(algorithms 1 and 2). Induction heads: Olsson et al. 2022, arXiv:2209.11895.
"""

import argparse
import base64
import io
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# Masks: boolean, True = may be attended to, broadcasting to (B, H, Tq, Tk). nn.MultiheadAttention's masks are
# the other way round: True = may not. A query that may attend to nothing gets output 0 and weights 0.


def causal_mask(q_len: int, k_len: int | None = None, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk): query i sees the keys up to its own position. k_len: default q_len.

    Aligned bottom-right: the last query sees every key, so that new queries fit keys which a cache has kept.
    (F.scaled_dot_product_attention's is_causal is aligned top-left: a single new query sees key 0 alone.)
    """
    k_len = q_len if k_len is None else k_len
    last_visible = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)  # (Tq, 1)
    return torch.arange(k_len, device=device) <= last_visible  # (Tq, Tk)


def padding_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """(B, 1, 1, T): token t of sequence b is real (may be attended to) while t < lengths[b].

    lengths: (B,) integers, 0 allowed; max_len: default the largest. ValueError for lengths outside
    0 .. max_len (reading the values is a wait on a GPU: call it where the batch is made). & merges it with
    causal_mask.
    """
    lengths = torch.as_tensor(lengths)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be (B,) integers, got {list(lengths.shape)} of {lengths.dtype}")
    longest = int(lengths.max()) if len(lengths) else 0
    max_len = longest if max_len is None else max_len
    if longest > max_len or (lengths < 0).any():
        raise ValueError(f"lengths must lie in 0 .. max_len={max_len}, got {int(lengths.min())} .. {longest}")
    real = torch.arange(max_len, device=lengths.device) < lengths[:, None]  # (B, T)
    return real[:, None, None, :]  # (B, 1, 1, T)


def allowed_pairs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """mask and causal in one: boolean, broadcasting to (..., Tq, Tk), at least 2-D; None if all is allowed.

    ValueError unless q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv) and mask fit together. Shapes are not
    checked while tracing: sizes are symbols there, and the outcome of a comparison would be frozen.
    """
    if not torch.jit.is_tracing():
        fit = q.dim() == k.dim() == v.dim() >= 2 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        if not (fit and q.size(-1) == k.size(-1) and k.size(-2) == v.size(-2)):
            got = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
            raise ValueError(f"q, k and v must be (..., Tq, D), (..., Tk, D) and (..., Tk, Dv), {got}")
        if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
            got = f"got {q.dtype}, {k.dtype}, {v.dtype}"
            raise ValueError(f"q, k and v must have the same floating-point dtype, {got}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = may be attended to), got {mask.dtype}")
        scores = list(q.shape[:-1]) + [k.size(-2)]
        for i in range(1, 1 if torch.jit.is_tracing() else 1 + mask.dim()):
            if i > len(scores) or (mask.size(-i) != 1 and mask.size(-i) != scores[-i]):
                raise ValueError(f"mask {list(mask.shape)} does not broadcast to (..., Tq, Tk) = {scores}")
        mask = torch.atleast_2d(mask)
    if causal:
        triangle = causal_mask(q.size(-2), k.size(-2), q.device)
        mask = triangle if mask is None else mask & triangle
    return mask


# -----------------------------------------------------------------------------
# One idea, four times: softmax(q kᵀ / √D) v (eq. 1). q and k are each scaled by D^-¼ before their product:
# that is the same, and q kᵀ alone would overflow float16.


def attention_loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False) -> Tensor:
    """1. The equation, a query at a time: to check the others against. Arguments as in the next."""
    scale = q.size(-1) ** -0.25
    allowed = allowed_pairs(q, k, v, mask, causal)
    allowed = torch.tensor(True) if allowed is None else allowed
    allowed = allowed.expand(*q.shape[:-1], k.size(-2))  # (..., Tq, Tk)
    output = q.new_empty(*q.shape[:-1], v.size(-1))
    for *head, i in itertools.product(*map(range, q.shape[:-1])):  # every query of every head
        h = tuple(head)
        seen = allowed[h][i]  # (Tk,) the keys that this query may attend to
        scores = (k[h][seen] * scale) @ (q[h][i] * scale)  # (n seen,)
        output[h][i] = scores.softmax(dim=0) @ v[h][seen]  # (Dv,) a mean of the seen values; of none: 0
    return output  # (..., Tq, Dv)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """2. The equation, written out. Differentiable twice; holds all Tq x Tk scores.

    q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv); mask boolean, True = may attend, broadcasting to
    (..., Tq, Tk). Returns the output (..., Tq, Dv) and the weights (..., Tq, Tk), those before dropout.
    dropout_p is applied whenever it is above 0: pass 0 in evaluation. ValueError for what doesn't fit.
    """
    allowed = allowed_pairs(q, k, v, mask, causal)
    scale = q.size(-1) ** -0.25
    scores = (q * scale) @ (k * scale).transpose(-2, -1)  # (..., Tq, Tk)
    if allowed is None:
        weights = scores.softmax(dim=-1)
    else:  # an empty row keeps its scores at first: the softmax of -inf alone is NaN, and its gradient too
        empty = ~allowed.any(dim=-1, keepdim=True)  # (..., Tq, 1)
        weights = scores.masked_fill(~(allowed | empty), -math.inf).softmax(dim=-1)
        weights = weights.masked_fill(empty, 0.0)
    return F.dropout(weights, dropout_p) @ v, weights  # (..., Tq, Dv), (..., Tq, Tk)


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, block_size: int = 128
) -> Tensor:
    """3. The same from blocks of block_size x block_size scores, as FlashAttention does: O(T) memory.

    Arguments as in 2 (a full mask is itself Tq x Tk; causal costs nothing). Differentiable once: the backward
    pass recomputes the scores, and create_graph=True raises RuntimeError. float16 and bfloat16 are summed in
    float32. Written in Python, it saves memory, not time.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    allowed = allowed_pairs(q, k, v, mask, causal=False)
    if allowed is not None:
        allowed = allowed.expand(*q.shape[:-1], k.size(-2))  # a view: no memory
    return BlockwiseAttention.apply(q, k, v, allowed, causal, block_size)


class BlockwiseAttention(torch.autograd.Function):
    """What blockwise_attention runs: keeps output and log Σ exp(score) a query, recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, allowed, causal, block_size):
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = widened_and_scaled(q, k, v)
            output = q.new_empty(*q.shape[:-1], v.size(-1))
            log_total = torch.empty_like(q_[..., :1])  # (..., Tq, 1) log Σ exp(score)
            for rows, key_blocks in block_grid(q.size(-2), k.size(-2), causal, block_size):
                # Of the blocks so far: the largest score, Σ exp(score - largest), and Σ exp(...) value.
                top = torch.full_like(q_[..., rows, :1], torch.finfo(q_.dtype).min)  # (..., Bq, 1)
                total, summed = torch.zeros_like(top), torch.zeros_like(output[..., rows, :], dtype=q_.dtype)
                for columns in key_blocks:
                    scores = block_scores(q_, k_, allowed, causal, rows, columns)  # (..., Bq, Bk)
                    new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
                    fade, e = (top - new_top).exp(), (scores - new_top).exp()
                    total = total * fade + e.sum(dim=-1, keepdim=True)
                    summed = summed * fade + e @ v_[..., columns, :]  # (..., Bq, Dv)
                    top = new_top
                # total is 0 where no key is allowed; elsewhere the largest score alone has added exp(0) = 1.
                output[..., rows, :] = summed / total.clamp(min=1)
                # exp(score - inf) = 0: an empty row's weights in the backward pass.
                log_total[..., rows, :] = (top + total.log()).masked_fill(total == 0, math.inf)
        ctx.save_for_backward(q, k, v, allowed, output, log_total)
        ctx.causal, ctx.block_size = causal, block_size
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True; a silent second derivative would lack our part
            raise RuntimeError("blockwise_attention has no second derivative: use the written-out form")
        q, k, v, allowed, output, log_total = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = widened_and_scaled(q, k, v)
            grad = grad_output.to(q_.dtype)
            mean_grad = (grad * output).sum(dim=-1, keepdim=True)  # (..., Tq, 1) Σ weight dweight
            dq, dk, dv = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
            for rows, key_blocks in block_grid(q.size(-2), k.size(-2), ctx.causal, ctx.block_size):
                for columns in key_blocks:
                    scores = block_scores(q_, k_, allowed, ctx.causal, rows, columns)
                    weights = (scores - log_total[..., rows, :]).exp()  # (..., Bq, Bk) the final ones
                    dweights = grad[..., rows, :] @ v_[..., columns, :].transpose(-2, -1)
                    dscores = weights * (dweights - mean_grad[..., rows, :])  # softmax's Jacobian
                    dq[..., rows, :] += dscores @ k_[..., columns, :]
                    dk[..., columns, :] += dscores.transpose(-2, -1) @ q_[..., rows, :]
                    dv[..., columns, :] += weights.transpose(-2, -1) @ grad[..., rows, :]
            scale = q.size(-1) ** -0.25
        return (dq * scale).to(q.dtype), (dk * scale).to(q.dtype), dv.to(q.dtype), None, None, None


def widened_and_scaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in at least float32, q and k times D^-¼; same shapes."""
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    scale = q.size(-1) ** -0.25
    return q.to(wide) * scale, k.to(wide) * scale, v.to(wide)


def block_grid(q_len: int, k_len: int, causal: bool, size: int) -> list[tuple[slice, list[slice]]]:
    """Each block of queries with the blocks of keys that it may see: none that lie wholly in the future."""

    def cut(length: int) -> list[slice]:
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    return [(rows, cut(rows.stop + k_len - q_len if causal else k_len)) for rows in cut(q_len)]


def block_scores(q, k, allowed: Tensor | None, causal: bool, rows: slice, columns: slice) -> Tensor:
    """(..., Bq, Bk) scores of one block, -inf where a pair may not attend. q and k are scaled already."""
    scores = q[..., rows, :] @ k[..., columns, :].transpose(-2, -1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[..., rows, columns], -math.inf)
    if causal:  # this block of causal_mask
        last_visible = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + k.size(-2) - q.size(-2)
        future = torch.arange(columns.start, columns.stop, device=q.device) > last_visible  # (Bq, Bk)
        scores = scores.masked_fill(future, -math.inf)
    return scores


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """4. The same by torch's fused kernel, with this file's masks. Arguments as in 2; the one to use.

    On a CPU the kernel takes q (B, H, Tq, D), a mask of 2 or 4 dimensions, D = Dv and no dropout, and has a
    first derivative only; for anything else torch takes a path that holds all scores.
    """
    # The kernel's own triangle skips the future (a mask doesn't) but is aligned top-left: ours where Tq = Tk,
    # which a trace would fix for all later sizes.
    if causal and mask is None and not torch.jit.is_tracing() and q.shape[-2:-1] == k.shape[-2:-1]:
        allowed_pairs(q, k, v, mask, causal=False)  # the checks
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    allowed = allowed_pairs(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p)  # (..., Tq, Dv)


# -----------------------------------------------------------------------------
# Multi-head attention


class MultiHeadAttention(nn.Module):
    """n_heads attentions side by side, each on its own D = d_model / n_heads features (section 3.2.2).

    kv_dim: width of the context, default d_model. dropout: of the weights, only while training. fused=False
    takes the written-out path (second derivatives). Batch first. ValueError unless n_heads divides d_model.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout=0.0, bias=True, kv_dim: int | None = None, fused=True
    ):
        super().__init__()
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got d_model={d_model} and n_heads={n_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.d_model, self.n_heads, self.dropout, self.fused = d_model, n_heads, dropout, fused
        self.kv_dim = d_model if kv_dim is None else kv_dim
        if self.kv_dim < 1:
            raise ValueError(f"kv_dim must be at least 1, got {kv_dim}")
        self.q_proj = nn.Linear(d_model, d_model, bias)
        self.k_proj = nn.Linear(self.kv_dim, d_model, bias)
        self.v_proj = nn.Linear(self.kv_dim, d_model, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if bias:
                nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """query (B, Tq, C), context (B, Tk, kv_dim) or None for self-attention -> (B, Tq, C).

        mask: boolean, True = may attend, broadcasting to (B, H, Tq, Tk). A query that may attend to nothing
        gets out_proj's bias. ValueError for shapes that don't fit, and a mask that isn't boolean.
        """
        q, k, v = self.project(query, context)
        if context is not None:  # not the kernel's own triangle: a trace must fit every Tq and Tk
            mask, causal = allowed_pairs(q, k, v, mask, causal), False
        return self.attend(q, k, v, mask, causal)

    def forward_with_weights(
        self, query: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """forward's output, to the bit, and the weights (B, H, Tq, Tk) before dropout, at twice the work."""
        q, k, v = self.project(query, context)
        weights = scaled_dot_product_attention(q, k, v, mask, causal)[1]
        return self.forward(query, context, mask, causal), weights

    def forward_cached(self, query: Tensor, cache: "KVCache", mask: Tensor | None = None) -> Tensor:
        """Causal self-attention of new tokens (B, Tnew, C), which are added to those in the cache.

        Token by token or in pieces, the results are those of forward(all, causal=True). mask broadcasts to
        (B, H, Tnew, T), T counting all tokens so far.
        """
        q, k, v = self.project(query, None)
        k, v = cache.append(k, v)
        return self.attend(q, k, v, mask, causal=True)

    def project(self, query: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, Tq, D), k and v (B, H, Tk, D): views, so the kernel reads what the projections wrote."""
        source = query if context is None else context
        if not torch.jit.is_tracing():
            if query.dim() != 3 or query.size(-1) != self.d_model:
                raise ValueError(f"query must be (B, Tq, d_model={self.d_model}), got {list(query.shape)}")
            if source.dim() != 3 or source.size(-1) != self.kv_dim or source.size(0) != query.size(0):
                expected = f"(B={query.size(0)}, Tk, kv_dim={self.kv_dim})"
                raise ValueError(f"context (else query) must be {expected}, got {list(source.shape)}")
        q, k, v = self.q_proj(query), self.k_proj(source), self.v_proj(source)  # (B, T, C)
        return self.split(q), self.split(k), self.split(v)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        if self.fused:
            heads = fused_attention(q, k, v, mask, causal, dropout_p)
        else:
            heads = scaled_dot_product_attention(q, k, v, mask, causal, dropout_p)[0]
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, H, Tq, D) -> (B, Tq, C)

    @classmethod
    def from_torch(cls, source: nn.MultiheadAttention) -> "MultiHeadAttention":
        """A copy of torch's module: same weights, dropout, mode, dtype and device; here always batch first.

        ValueError for what this class doesn't have: kdim != vdim, add_bias_kv, add_zero_attn.
        """
        if source.kdim != source.vdim:
            raise ValueError(f"kdim and vdim must be equal, got kdim={source.kdim} and vdim={source.vdim}")
        if source.bias_k is not None or source.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn have no counterpart here, got one that is True")
        bias = source.in_proj_bias is not None
        ours = cls(source.embed_dim, source.num_heads, source.dropout, bias, source.kdim)
        ours.to(source.out_proj.weight).train(source.training)  # dtype and device first: copies to the bit
        if source.in_proj_weight is not None:  # one matrix, or three where kdim differs from embed_dim
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = source.q_proj_weight, source.k_proj_weight, source.v_proj_weight
        biases = source.in_proj_bias.chunk(3) if bias else ()
        state = {f"{name}_proj.weight": x for name, x in zip("qkv", weights, strict=True)}
        state |= {f"{name}_proj.bias": x for name, x in zip("qkv", biases, strict=False)}
        state |= {f"out_proj.{name}": x for name, x in source.out_proj.named_parameters()}
        ours.load_state_dict(state)
        return ours


class KVCache:
    """Keys and values, (B, H, T, D) each, of the tokens that MultiHeadAttention.forward_cached has seen.

    Appending copies them, about as much traffic as attending to them; autograd goes through.
    A beam search reorders its hypotheses with cache.k, cache.v = cache.k[rows], cache.v[rows].
    """

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of the new tokens and returns those of all. ValueError if B, H or D differ."""
        if self.k is not None:
            old, new = list(self.k.shape), list(k.shape)
            if old[:2] + old[3:] != new[:2] + new[3:]:
                raise ValueError(f"the cache holds keys (B, H, T, D) = {old}, the new ones are {new}")
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


# -----------------------------------------------------------------------------
# Pictures of weights, (H, Tq, Tk) or (L, H, Tq, Tk)


def checked_weights(weights: Tensor, q_tokens: list[str], k_tokens: list[str]) -> Tensor:
    """(L, H, Tq, Tk) float32 on the CPU; ValueError unless they are weights of these tokens."""
    lengths = (len(q_tokens), len(k_tokens))
    if weights.dim() not in (3, 4) or weights.numel() == 0 or weights.shape[-2:] != lengths:
        expected = f"(H, Tq, Tk) or (L, H, Tq, Tk) with Tq={lengths[0]} and Tk={lengths[1]} tokens"
        raise ValueError(f"weights must be {expected}, got {list(weights.shape)}")
    weights = weights.detach().to("cpu", torch.float32)
    if not ((weights >= 0) & (weights <= 1.01)).all():  # 1.01: bfloat16 rounds up; NaN is refused, too
        raise ValueError(f"weights must lie in [0, 1], got {weights.min():.4g} .. {weights.max():.4g}")
    return weights.clamp(max=1).reshape(-1, *weights.shape[-3:])


def plot_attention(weights: Tensor, q_tokens: list[str], k_tokens: list[str], path: str | Path) -> Path:
    """A PNG: a row of maps per layer, a map per head, one colour scale. Grey cells are exactly 0: masked.

    weights (H, Tq, Tk) or (L, H, Tq, Tk). Of long sequences every n-th token has a label, and over 256 tokens
    a cell shows the largest of several weights, so that a thin line isn't lost. Needs matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    weights = checked_weights(weights, q_tokens, k_tokens)
    n_layers, n_heads, q_len, k_len = weights.shape
    cells = F.adaptive_max_pool2d(weights, (min(q_len, 256), min(k_len, 256)))
    cells = cells.masked_fill(cells == 0, math.nan).numpy()
    inch = min(0.15, 5 / max(q_len, k_len), 30 / (n_heads * k_len), 30 / (n_layers * q_len))  # per token
    width, height = max(inch * k_len, 1.2), max(inch * q_len, 1.2)  # of one map
    fig = Figure(figsize=(width * n_heads + 2, height * n_layers + 1.2), layout="constrained")
    grid = fig.subplots(n_layers, n_heads, squeeze=False, sharex=True, sharey=True)
    look = {"cmap": colormaps["Blues"].with_extremes(bad="0.8"), "vmin": 0, "vmax": weights.max().item()}
    look |= {"extent": (-0.5, k_len - 0.5, q_len - 0.5, -0.5), "aspect": "auto"}  # axes in tokens, not cells
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        picture = grid[layer, head].imshow(cells[layer, head], **look)
        grid[layer, head].set_title(f"layer {layer + 1} head {head + 1}", fontsize=8)
        grid[layer, head].tick_params(labelsize=7)
    columns, rows = (range(0, n, math.ceil(0.14 * n / size)) for n, size in ((k_len, width), (q_len, height)))
    for axes in grid[-1]:
        axes.set_xticks(columns, [label(k_tokens[i]) for i in columns], rotation=90, parse_math=False)
    for axes in grid[:, 0]:
        axes.set_yticks(rows, [label(q_tokens[i]) for i in rows], parse_math=False)
    fig.supxlabel("key: looked at", fontsize=9)
    fig.supylabel("query: looks", fontsize=9)
    bar = {"fraction": 0.3 / fig.get_figwidth(), "aspect": 25, "shrink": min(1, 3 / fig.get_figheight())}
    fig.colorbar(picture, ax=grid, label="weight (grey: masked)", **bar)
    return save_figure(fig, Path(path))


def label(token: str) -> str:
    """A token as an axis label: control characters as escapes, long ones cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return text if len(text) <= 12 else text[:11] + "…"


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_figure(fig, path: Path) -> Path:
    """Write the figure as a PNG, beside its place and then over it."""
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=100)
    write_atomically(path, png.getvalue())
    return path


def attention_html(weights: Tensor, q_tokens: list[str], k_tokens: list[str], path: str | Path) -> Path:
    """One page that needs no network: pick a layer and head, point at a token, read what it looks at.

    weights (H, Tq, Tk) or (L, H, Tq, Tk), of self- or cross-attention. They are stored in 16 bits: off by at
    most 2e-5. 0, which is shown as masked, stays 0, and nothing else that float32 can hold becomes 0.
    """
    weights = checked_weights(weights, q_tokens, k_tokens)
    steps = (weights * 65535).round().clamp(min=1).masked_fill(weights == 0, 0).to(torch.uint16)
    packed = bytes(steps.view(torch.uint8).flatten().tolist())  # little-endian, as JavaScript's Uint16Array
    data = {"shape": list(weights.shape), "queries": list(q_tokens), "keys": list(k_tokens)}
    data = json.dumps(data | {"weights": base64.b64encode(packed).decode()})
    page = PAGE.replace("DATA", data.replace("<", "\\u003c"))  # no token can end the script element
    write_atomically(Path(path), page.encode())
    return Path(path)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Attention</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
  body { font: 14px system-ui, sans-serif; margin: 16px; color: #222; background: #fff }
  h2 { font-size: 15px; margin: 16px 0 4px }
  canvas { image-rendering: pixelated; display: block }
  #heads { display: grid; gap: 4px; justify-content: start; overflow-x: auto }
  #heads button { padding: 2px; border: 2px solid #ddd; background: #fff; font-size: 11px; cursor: pointer }
  #heads button.on { border-color: #d60 }
  #heads canvas { width: 72px; height: 72px }
  .tokens { display: flex; flex-wrap: wrap; gap: 3px }
  .tokens span { white-space: pre; border: 1px solid #ccc; border-radius: 3px; padding: 1px 4px }
  #detail { display: flex; gap: 16px }
  #queries span.on { outline: 2px solid #d60 }
  #keys small { display: block; font-size: 10px; text-align: center }
</style>
<h2>Heads (down: layers; in each map down: queries, across: keys; grey: masked)</h2><div id="heads"></div>
<h2 id="title"></h2>
<div id="detail"><div><canvas id="map"></canvas></div><div>
  Queries: point at one, here or in the map<div id="queries" class="tokens"></div><br>
  Keys: what it looks at (darkest: its largest weight; grey: masked)<div id="keys" class="tokens"></div>
</div></div>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const [L, H, Q, K] = data.shape, bytes = Uint8Array.from(atob(data.weights), c => c.charCodeAt(0));
const weights = new Uint16Array(bytes.buffer), largest = weights.reduce((a, b) => Math.max(a, b), 1);
const row = (l, h, q) => weights.subarray(((l * H + h) * Q + q) * K, ((l * H + h) * Q + q + 1) * K);
const colour = t => [255 - 247 * t, 255 - 207 * t, 255 - 148 * t];  // white to dark blue
let layer = 0, head = 0, query = 0;

function draw(canvas, l, h) {  // a pixel per weight
  [canvas.width, canvas.height] = [K, Q];
  const context = canvas.getContext("2d"), image = context.createImageData(K, Q);
  for (let q = 0; q < Q; q++) row(l, h, q).forEach((w, k) =>
    image.data.set([...(w ? colour(w / largest) : [204, 204, 204]), 255], 4 * (q * K + k)));
  context.putImageData(image, 0, 0);
}
function add(text, list) {
  const span = list.appendChild(document.createElement("span"));
  span.textContent = text;  // text, never markup
  return span;
}
function look(q) {
  query = q;
  const w = row(layer, head, q), top = Math.max(1, ...w);
  $("title").textContent = `Layer ${layer + 1}, head ${head + 1}: query ${q + 1}, “${data.queries[q]}”`;
  [...$("queries").children].forEach((span, i) => span.classList.toggle("on", i == q));
  [...$("keys").children].forEach((span, k) => {
    span.style.background = w[k] ? `rgb(${colour(w[k] / top)})` : "#ccc";
    span.style.color = w[k] > top / 2 ? "#fff" : "#222";
    span.lastChild.textContent = w[k] ? (w[k] / 65535).toFixed(3) : "–";
  });
}
function pick(l, h) {
  [layer, head] = [l, h];
  [...$("heads").children].forEach((button, i) => button.classList.toggle("on", i == l * H + h));
  draw($("map"), l, h);
  look(query);
}
$("heads").style.gridTemplateColumns = `repeat(${H}, max-content)`;
for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
  const button = $("heads").appendChild(document.createElement("button"));
  button.textContent = `L${l + 1} H${h + 1}`;
  draw(button.appendChild(document.createElement("canvas")), l, h);
  button.onclick = () => pick(l, h);
}
data.queries.forEach((text, q) => Object.assign(add(text, $("queries")),
  { tabIndex: 0, onmouseenter: () => look(q), onfocus: () => look(q) }));
data.keys.forEach(text => add(text, $("keys")).appendChild(document.createElement("small")));
const cell = Math.max(1, Math.min(24, Math.floor(480 / Math.max(Q, K))));  // pixels
$("map").style.cssText = `width: ${cell * K}px; height: ${cell * Q}px; border: 1px solid #999`;
$("map").onmousemove = event => look(Math.max(0, Math.min(Q - 1, Math.floor(event.offsetY / cell))));
pick(0, 0);
</script></html>
"""


# -----------------------------------------------------------------------------
# Demo: masks, agreement, an induction head, memory and time


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    steps: int = setting(200, "training steps of the induction model; it has learnt after about 100")
    max_len: int = setting(4096, "memory and time are measured at T = 256, 512, ... up to here")
    benchmark: bool = setting(False, "only time MultiHeadAttention against nn.MultiheadAttention")
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    out: str = setting("out/attention", "pictures, the page and report.json go here")
    seed: int = setting(0, "same seed, same weights")


RUNGS = {  # the ladder without the loop, as f(q, k, v, mask=None, causal=False) -> output
    "written-out": lambda *arguments: scaled_dot_product_attention(*arguments)[0],
    "blockwise": blockwise_attention,
    "fused": fused_attention,
}


def print_masks() -> None:
    """Each mask with its shape, x where a query may attend to a key."""
    padding = padding_mask(torch.tensor([2, 4]))
    table = {"causal_mask(4)": causal_mask(4), "causal_mask(2, 4), the last two of four": causal_mask(2, 4)}
    table |= {"padding_mask([2, 4]), two sequences": padding}
    table |= {"padding_mask([2, 4]) & causal_mask(4)": padding & causal_mask(4)}
    print(f"{'mask':42}{'shape':15}x: may attend; a group per query, a letter per key")
    for name, mask in table.items():
        maps = mask.expand(-1, 1, -1, -1) if mask.dim() == 4 else mask[None, None]  # (B or 1, 1, Tq or 1, Tk)
        drawn = [" ".join("".join(".x"[x] for x in row) for row in one[0].int()) for one in maps]
        print(f"  {name:40}{tuple(mask.shape)!s:15}{'  |  '.join(drawn)}")


def agreement() -> dict:
    """Largest difference of each rung from attention_loop, over output and gradients, in float64."""
    pad = padding_mask(torch.tensor([0, 200]))  # sequence 0 may attend to nothing
    cases = {"none": (None, False), "causal": (None, True), "padding": (pad, False), "both": (pad, True)}
    print("largest difference from the loop\n  masks   " + "".join(f"{name:>12}" for name in RUNGS))
    table = {}
    for case, masks in cases.items():
        sizes = ((2, 1, 150, 8), (2, 1, 200, 8), (2, 1, 200, 5))  # Tq < Tk, D != Dv, more than one block
        inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        values = {}
        for name, attention in {"loop": attention_loop, **RUNGS}.items():
            output = attention(*inputs, *masks)
            gradients = torch.autograd.grad(output.square().sum(), inputs)
            values[name] = torch.cat([x.flatten() for x in (output, *gradients)])
        table[case] = {name: (values[name] - values["loop"]).abs().max().item() for name in RUNGS}
        print(f"  {case:8}" + "".join(f"{difference:12.1e}" for difference in table[case].values()))
    return table


WORDS = "ant bat bee cat cod cow dog eel elk emu fly fox gnu hen hog jay koi owl pig ram rat yak".split()
N_SEEN = 12  # different words in a sequence


def induction_batch(n: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """n sequences: N_SEEN different words, then all of them but the last again, in another order.

    Returns tokens (n, 2 N_SEEN - 1) and, for each word of the second half, (n, N_SEEN - 1), the place of the
    word that followed it in the first half and that word: the answer.
    """
    first = torch.rand(n, len(WORDS), generator=generator).argsort(dim=1)[:, :N_SEEN]
    order = torch.rand(n, N_SEEN - 1, generator=generator).argsort(dim=1)
    tokens = torch.cat((first, first.gather(1, order)), dim=1)
    return [x.to(device) for x in (tokens, order + 1, first.gather(1, order + 1))]


class InductionModel(nn.Module):
    """Two layers of attention and nothing else: enough to find what followed a word the last time."""

    def __init__(self, d_model: int = 64, n_heads: int = 2):
        super().__init__()
        self.words, self.positions = nn.Embedding(len(WORDS), d_model), nn.Embedding(2 * N_SEEN - 1, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.layers = nn.ModuleList(MultiHeadAttention(d_model, n_heads) for _ in range(2))
        self.head = nn.Linear(d_model, len(WORDS), bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> logits of the second half (B, N_SEEN - 1, V) and weights (L, B, H, T, T)."""
        x, weights = self.words(tokens) + self.positions.weight, []  # (B, T, C)
        for i, layer in enumerate(self.layers):
            found, w = layer.forward_with_weights(self.norms[i](x), causal=True)
            x, weights = x + found, [*weights, w]
        return self.head(self.norms[2](x[:, N_SEEN:])), torch.stack(weights)


def induction(s: Settings, device: torch.device) -> dict:
    """Trains the model, then compares its answers and its maps with the known ones, on fresh sequences."""
    print(f"induction: {N_SEEN} words, then the same in another order; what followed each the first time?")
    generator, model = torch.Generator().manual_seed(s.seed), InductionModel().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    for step in range(1, s.steps + 1):
        tokens, _, answers = induction_batch(64, generator, device)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step:4}  loss {loss.item():.4f}")
    tokens, places, answers = induction_batch(500, generator, device)
    with torch.no_grad():
        logits, weights = model(tokens)
    guesses = logits.argmax(dim=-1)  # (N, N_SEEN - 1)
    for n, i in (guesses != answers).nonzero().tolist()[:3]:
        asked, answer, guess = (WORDS[x[n, i]] for x in (tokens[:, N_SEEN:], answers, guesses))
        print(f"  mistake: {answer} followed {asked}, the model says {guess}")
    places = places[:, None, :, None].expand(-1, weights.size(2), -1, 1)  # (N, H, N_SEEN - 1, 1)
    on_answer = weights[1, :, :, N_SEEN:].gather(-1, places).mean((0, 2, 3))  # (H,)
    one_back = weights[0].diagonal(-1, dim1=-2, dim2=-1)[..., : N_SEEN - 1].mean((0, 2))  # (H,)
    right, before, found = (guesses == answers).float().mean().item(), one_back.max(), on_answer.min()
    print(f"  {answers.numel():,} fresh questions: {right:.2%} answered right")
    print(f"  layer 1, better head: {before:.1%} of its weight on the word before")
    print(f"  layer 2, lesser head: {found:.1%} of its weight on the answer")
    words = [WORDS[i] for i in tokens[0].tolist()]
    plot_attention(weights[:, 0], words, words, Path(s.out, "heads.png"))
    attention_html(weights[:, 0], words, words, Path(s.out, "heads.html"))
    return {"exact_match": right, "share_on_right_key": found.item(), "share_one_back": before.item()}


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes alive at once in tensors that operations inside work() read or returned, on any device."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        live, peak = {}, 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            storages = [x.untyped_storage() for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
            self.live = {reference: n for reference, n in self.live.items() if not reference.expired()}
            self.live |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
            self.peak = max(self.peak, sum(self.live.values()))
            return result

    with Watch() as watch:
        work()
    return watch.peak


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work() takes, a GPU's part of it included."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def scaling(s: Settings, device: torch.device) -> dict:
    """Peak memory and time of forward + backward at growing T (one head, D = 64): a table and a picture."""
    lengths = [2**i for i in range(8, s.max_len.bit_length())]  # 256, 512, ... max_len
    measured = {"peak MB": {name: [] for name in RUNGS}, "ms": {name: [] for name in RUNGS}}
    print("forward + backward\n     T" + "".join(f"{name:>12} MB{'ms':>9}" for name in RUNGS))
    for length in lengths:
        inputs = [torch.randn(1, 1, length, 64, device=device, requires_grad=True) for _ in range(3)]
        for name, attention in RUNGS.items():

            def work(attention=attention, inputs=inputs) -> None:
                torch.autograd.grad(attention(*inputs).sum(), inputs)

            measured["peak MB"][name].append(round(peak_bytes(work) / 2**20, 2))  # warms up, too
            measured["ms"][name].append(round(1e3 * min(seconds(work, device) for _ in range(3)), 2))
        row = [[by_name[name][-1] for by_name in measured.values()] for name in RUNGS]
        print(f"{length:6}" + "".join(f"{megabytes:15.1f}{ms:9.1f}" for megabytes, ms in row))
    slopes = {name: round(math.log2(mb[-1] / mb[-2]), 2) for name, mb in measured["peak MB"].items()}
    print("memory grows as " + ", ".join(f"T^{slope} ({name})" for name, slope in slopes.items()))
    plot_scaling(lengths, measured, Path(s.out, "scaling.png"))
    return {"lengths": lengths, "memory_slopes": slopes, **measured}


def plot_scaling(lengths: list[int], measured: dict, path: Path) -> None:
    """PNG: memory (MB) and time (ms) over T, both axes logarithmic."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (unit, by_name) in zip(fig.subplots(1, 2), measured.items(), strict=True):
        for name, values in by_name.items():
            axes.loglog(lengths, values, marker="o", markersize=4, label=name)
        for power, line in ((1, "k:"), (2, "k--")):  # slopes to compare with
            start = 0.6 * min(values[0] for values in by_name.values())
            guide = [start * (length / lengths[0]) ** power for length in lengths]
            axes.loglog(lengths, guide, line, linewidth=1, label=("O(T)", "O(T²)")[power - 1])
        axes.set_xticks(lengths, lengths)
        axes.minorticks_off()
        axes.set(xlabel="sequence length T (tokens)", ylabel=f"{unit}, forward + backward")
        axes.legend(fontsize=8)
    save_figure(fig, path)


def benchmark(device: torch.device) -> dict:
    """MultiHeadAttention against nn.MultiheadAttention(need_weights=False), forward + backward, in turn."""
    x = torch.randn(32, 256, 256, device=device, requires_grad=True)  # (B, T, C)
    theirs = nn.MultiheadAttention(256, 8, batch_first=True, device=device)
    ours = MultiHeadAttention.from_torch(theirs)
    runs = {
        "torch_ms": lambda: theirs(x, x, x, need_weights=False)[0].sum().backward(),
        "ours_ms": lambda: ours(x).sum().backward(),
    }
    rounds = [{name: 1e3 * seconds(run, device) for name, run in runs.items()} for _ in range(33)][3:]  # warm
    rounds = [times | {"ratio": times["torch_ms"] / times["ours_ms"]} for times in rounds]
    report = {"shape": {"B": 32, "T": 256, "d_model": 256, "n_heads": 8}, "rounds": len(rounds)}
    for name in rounds[0]:
        low, median, high = statistics.quantiles((times[name] for times in rounds), n=4)
        report[name] = {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
        print(f"{name:9} median {median:.3f}, quartiles {low:.3f} .. {high:.3f}")
    return report


# -----------------------------------------------------------------------------


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for f in fields(Settings):
        flag, reason = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag, default=f.default, help=reason, **kind)
    s = Settings(**vars(parser.parse_args(argv)))
    for name, least in (("steps", 1), ("max_len", 512)):  # two lengths give a slope
        if getattr(s, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(s, name)}")
    return s


def usable_device(name: str) -> torch.device:
    """For "auto" cuda where there is one, else cpu. Raises ValueError for one that can't be used here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def machine(device: torch.device) -> dict:
    """What a time depends on."""
    matrix = torch.randn(1024, 1024)
    gemm = statistics.median(seconds(lambda: matrix @ matrix, torch.device("cpu")) for _ in range(9))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(2 * 1024**3 / gemm / 1e9, 1),
        "torch": torch.__version__,
    }


def main() -> None:
    s = settings_from_command_line()
    device = usable_device(s.device)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=s.out).close()  # a place that can't be written is known before the work
    # The demo's tensors are small: a second thread would bring little, and nothing where the cores are busy.
    torch.set_num_threads(2 if s.benchmark else 1)
    torch.manual_seed(s.seed)
    chosen = asdict(s) | {"device": device, "dtype": "float32", "threads": torch.get_num_threads()}
    print(" ".join(f"{k}={v}" for k, v in chosen.items()), f"torch={torch.__version__}")
    start = time.perf_counter()
    if s.benchmark:
        report = benchmark(device)
    else:
        import matplotlib  # noqa: F401  before the work: a missing library is known at once

        print_masks()
        report = {"largest_difference": agreement(), **induction(s, device), "scaling": scaling(s, device)}
    report |= {"settings": asdict(s), "seconds": round(time.perf_counter() - start, 1), **machine(device)}
    report["command"] = " ".join(["python", Path(__file__).name, *sys.argv[1:]])
    report["date"] = time.strftime("%Y-%m-%d")
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, EOFError, ImportError) as error:  # what a user can mend: no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
