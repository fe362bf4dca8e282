"""Attention four ways, from a loop that anyone can check to the fused kernel, and its pictures.

    Attention(Q, K, V) = softmax(Q Kᵀ / √D) V        (eq. 1)

On one CPU core: demo 14 s; an induction head puts 98% of its weight on the right key.
At T = 4096 backward needs 68 MB of the written-out form, 5 of the blockwise, 4 of the fused.

    python attention.py    # demo: an induction head, memory, time; --help lists its settings

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762. Dao, "FlashAttention-2",
arXiv:2307.08691 (algorithms 1 and 2). Olsson et al., "Induction Heads", arXiv:2209.11895.
"""

import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# Masks: boolean, True = may be attended to (nn.MultiheadAttention has it the other way round).
# They broadcast to (B, H, Tq, Tk); & merges them. A query without any key gets output 0.
#
#   causal_mask(4)   causal_mask(2, 4)   padding_mask([2, 4])   padding_mask([2, 4]) & causal_mask(4)
#   (4, 4)           (2, 4)              (2, 1, 1, 4)           (2, 1, 4, 4)
#     x . . .          x x x .             x x . .                x . . .      x . . .
#     x x . .          x x x x                                    x x . .      x x . .
#     x x x .                              x x x x                x x . .      x x x .
#     x x x x                                                     x x . .      x x x x


def causal_mask(q_len: int, k_len: int | None = None, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk): query i sees the keys up to its own position. k_len: default q_len.

    Aligned bottom-right: the last query sees every key, for instance those of a cache.
    (torch's is_causal is aligned top-left: a single new query sees key 0 alone.)
    """
    k_len = q_len if k_len is None else k_len
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)


def padding_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """(B, 1, 1, T): token t of sequence b is real while t < lengths[b].

    lengths: (B,) integers, 0 allowed; max_len: default the largest of them.
    ValueError for lengths outside 0 .. max_len. This check synchronises a GPU.
    """
    lengths = torch.as_tensor(lengths)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be (B,) integers, got {lengths.shape} of {lengths.dtype}")
    lengths = lengths.long()  # torch can't compare every kind of unsigned integer
    if max_len is None:
        max_len = int(lengths.max()) if len(lengths) else 0
    if ((lengths < 0) | (lengths > max_len)).any():
        raise ValueError(f"lengths must lie in 0 .. max_len={max_len}, got {lengths.tolist()}")
    real = torch.arange(max_len, device=lengths.device) < lengths[:, None]  # (B, T)
    return real[:, None, None, :]  # (B, 1, 1, T)


def allowed_pairs(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """mask and causal in one: boolean, at least 2-D, broadcasting to (..., Tq, Tk)."""
    if mask is None:
        mask = torch.ones(1, dtype=torch.bool, device=q.device)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = may be attended to), got {mask.dtype}")
    mask.expand(list(q.shape[:-1]) + [k.size(-2)])  # torch's error if the mask doesn't fit
    if causal:
        mask = mask & causal_mask(q.size(-2), k.size(-2), q.device)
    return torch.atleast_2d(mask)


# -----------------------------------------------------------------------------
# Equation 1, four times


def attention_loop(q, k, v, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """1. Reference version: a query at a time. Same arguments as the next one."""
    allowed = allowed_pairs(q, k, mask, causal).expand(*q.shape[:-1], k.size(-2))  # (..., Tq, Tk)
    # All leading dimensions become one: (..., T, D) -> (N, T, D).
    queries, keys, values, allowed = (x[None].flatten(0, -3) for x in (q, k, v, allowed))
    output = q.new_zeros(*queries.shape[:2], v.size(-1))  # (N, Tq, Dv)
    for n in range(queries.size(0)):
        for i in range(queries.size(1)):
            seen = allowed[n, i]  # (Tk,) the keys that this query may attend to
            query = queries[n, i] * q.size(-1) ** -0.5  # (D,)
            weights = (keys[n, seen] @ query).softmax(dim=0)  # (n seen,)
            output[n, i] = weights @ values[n, seen]  # a mean of the seen values; of none: 0
    return output.reshape(*q.shape[:-1], v.size(-1))  # (..., Tq, Dv)


def scaled_dot_product_attention(
    q, k, v, mask: Tensor | None = None, causal: bool = False, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """2. The equation, written out. Differentiable twice; holds all Tq x Tk scores.

    q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv), mask broadcasting to (..., Tq, Tk).
    Returns the output (..., Tq, Dv) and the weights (..., Tq, Tk) before dropout. Pass
    dropout_p=0 in evaluation. ValueError for a mask that isn't boolean.
    """
    scores = (q * q.size(-1) ** -0.5) @ k.mT  # (..., Tq, Tk); scaled first for float16
    if mask is None and not causal:
        weights = scores.softmax(dim=-1)
    else:
        # Rows without any key: -inf would give NaN; the lowest number gives equal weights, then 0.
        hidden = ~allowed_pairs(q, k, mask, causal)
        lowest = scores.new_full([], -math.inf).nan_to_num()  # finfo.min, which TorchScript lacks
        weights = scores.masked_fill(hidden, lowest).softmax(dim=-1).masked_fill(hidden, 0.0)
    return F.dropout(weights, dropout_p) @ v, weights


def blockwise_attention(q, k, v, mask: Tensor | None = None, causal=False, block_size=128) -> Tensor:
    """3. The same from blocks of block_size x block_size scores: O(T) memory.

    Arguments as in 2; half precision is summed in float32. In Python it saves memory, not time.
    Differentiable once: create_graph=True raises RuntimeError.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    v = v.expand(*k.shape[:-1], -1)  # torch's error unless there is a value for each key
    if mask is not None:  # expanded as a view: no memory
        mask = allowed_pairs(q, k, mask, causal=False).expand(*q.shape[:-1], k.size(-2))
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = q.to(wide) * q.size(-1) ** -0.5
    output = BlockwiseAttention.apply(scaled, k.to(wide), v.to(wide), mask, causal, block_size)
    return output.to(q.dtype)


class BlockwiseAttention(torch.autograd.Function):
    """Algorithms 1 and 2 of FlashAttention-2: a block has queries i and keys j."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, block_size):
        # Per query, over the blocks so far:
        m = torch.full_like(q[..., :1], torch.finfo(q.dtype).min)  # largest score
        l = torch.zeros_like(m)  # noqa: E741  Σ exp(score - m)
        acc = q.new_zeros(*q.shape[:-1], v.size(-1))  # Σ exp(score - m) value
        with torch.autocast(q.device.type, enabled=False):
            for i, j, s in blocks(q, k, mask, causal, block_size):
                m_new = torch.maximum(m[..., i, :], s.amax(dim=-1, keepdim=True))
                p = (s - m_new).exp()  # (..., Bq, Bk)
                alpha = (m[..., i, :] - m_new).exp()  # exp(score - m) -> exp(score - m_new)
                l[..., i, :] = alpha * l[..., i, :] + p.sum(dim=-1, keepdim=True)
                acc[..., i, :] = alpha * acc[..., i, :] + p @ v[..., j, :]
                m[..., i, :] = m_new
        # l is 0 where no key is allowed, else at least the largest score's exp(0) = 1.
        output = acc / l.clamp(min=1)
        lse = (m + l.log()).masked_fill(l == 0, math.inf)  # log Σ exp(score)
        ctx.save_for_backward(q, k, v, mask, output, lse)
        ctx.causal, ctx.block_size = causal, block_size
        return output

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():  # create_graph=True would be silently wrong
            raise RuntimeError("blockwise_attention has no second derivative")
        q, k, v, mask, output, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (do * output).sum(dim=-1, keepdim=True)  # (..., Tq, 1) Σ p dp
        with torch.autocast(q.device.type, enabled=False):
            for i, j, s in blocks(q, k, mask, ctx.causal, ctx.block_size):
                p = (s - lse[..., i, :]).exp()  # (..., Bq, Bk) the final weights
                dp = do[..., i, :] @ v[..., j, :].mT
                ds = p * (dp - delta[..., i, :])  # the softmax's Jacobian
                dq[..., i, :] += ds @ k[..., j, :]
                dk[..., j, :] += ds.mT @ q[..., i, :]
                dv[..., j, :] += p.mT @ do[..., i, :]
        return dq, dk, dv, None, None, None


def blocks(q, k, mask: Tensor | None, causal: bool, size: int):
    """Yields per block i, j and the (..., Bq, Bk) scores, -inf where a pair may not attend."""
    offset = k.size(-2) - q.size(-2)  # causal: query t sees the keys up to t + offset
    for start in range(0, q.size(-2), size):
        for key_start in range(0, k.size(-2), size):
            if causal and key_start >= start + size + offset:
                break  # all further keys lie in the future of all these queries
            i, j = slice(start, start + size), slice(key_start, key_start + size)
            s = q[..., i, :] @ k[..., j, :].mT
            if mask is not None:
                s = s.masked_fill(~mask[..., i, j], -math.inf)
            if causal:  # this block of causal_mask
                past = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
                s = s.masked_fill(~past.tril(offset + start - key_start), -math.inf)
            yield i, j, s


def fused_attention(q, k, v, mask: Tensor | None = None, causal: bool = False, dropout_p: float = 0.0):
    """4. The same by torch's kernel, with this file's masks: the one to use. Arguments as in 2.

    On a CPU it needs 4-D inputs, D = Dv, no dropout, no 3-D mask; else torch holds all scores.
    """
    # The kernel's own triangle skips the future, but is aligned top-left: as ours is where Tq = Tk.
    # A trace would take that for granted ever after.
    if mask is None and not (causal and (torch.jit.is_tracing() or q.size(-2) != k.size(-2))):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    allowed = allowed_pairs(q, k, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p)


# -----------------------------------------------------------------------------
# Multi-head attention


class MultiHeadAttention(nn.Module):
    """n_heads attentions side by side, each on its own D = d_model / n_heads features.

    kv_dim: width of the context, default d_model. dropout: of the weights, only in training.
    fused=False takes the written-out form, which has second derivatives.
    """

    def __init__(self, d_model, n_heads, dropout=0.0, bias=True, kv_dim=None, fused=True):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got {n_heads=} and {d_model=}")
        self.n_heads = n_heads
        self.dropout = dropout
        self.fused = fused
        self.q_proj = nn.Linear(d_model, d_model, bias)
        self.k_proj = nn.Linear(kv_dim or d_model, d_model, bias)
        self.v_proj = nn.Linear(kv_dim or d_model, d_model, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if bias:
                nn.init.zeros_(projection.bias)

    def forward(self, query, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False):
        """query (B, Tq, C), context (B, Tk, kv_dim) or None: self-attention -> (B, Tq, C).

        mask broadcasts to (B, H, Tq, Tk). A query without any key gets out_proj's bias.
        """
        q, k, v = self.project(query, context)
        if causal and context is not None:  # torch.export mustn't rely on Tq != Tk
            mask, causal = allowed_pairs(q, k, mask, causal), False
        return self.attend(q, k, v, mask, causal)

    def forward_with_weights(self, query, context=None, mask=None, causal=False):
        """forward's output, to the bit, and the weights (B, H, Tq, Tk) before dropout."""
        q, k, v = self.project(query, context)
        weights = scaled_dot_product_attention(q, k, v, mask, causal)[1]
        return self.forward(query, context, mask, causal), weights

    def forward_cached(self, query: Tensor, cache: "KVCache", mask: Tensor | None = None) -> Tensor:
        """forward(..., causal=True) of new tokens (B, Tnew, C) alone, after those in the cache.

        mask broadcasts to (B, H, Tnew, T), T all tokens so far. An error leaves the cache as it was.
        """
        q, k, v = self.project(query, None)
        if cache.k is not None:
            k = torch.cat((cache.k, k), dim=2)  # (B, H, T, D)
            v = torch.cat((cache.v, v), dim=2)
        output = self.attend(q, k, v, mask, causal=True)
        cache.k, cache.v = k, v
        return output

    def project(self, query, context: Tensor | None):
        """q (B, H, Tq, D), k and v (B, H, Tk, D), views of what the projections wrote."""
        source = query if context is None else context
        if query.dim() != 3 or source.dim() != 3:
            raise ValueError(f"inputs must be (B, T, width), got {query.shape} and {source.shape}")
        q, k, v = self.q_proj(query), self.k_proj(source), self.v_proj(source)  # (B, T, C)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def attend(self, q, k, v, mask: Tensor | None, causal: bool):
        dropout_p = self.dropout if self.training else 0.0
        if self.fused:
            heads = fused_attention(q, k, v, mask, causal, dropout_p)
        else:
            heads = scaled_dot_product_attention(q, k, v, mask, causal, dropout_p)[0]
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, H, Tq, D) -> (B, Tq, C)

    @classmethod
    def from_torch(cls, source: nn.MultiheadAttention) -> "MultiHeadAttention":
        """A copy: same weights, dtype, device, requires_grad, dropout and mode; batch first."""
        if source.kdim != source.vdim or source.bias_k is not None or source.add_zero_attn:
            raise ValueError("kdim != vdim, add_bias_kv and add_zero_attn have no counterpart")

        def copies(packed: nn.Parameter, n: int = 1) -> list[nn.Parameter]:
            return [nn.Parameter(x.clone(), packed.requires_grad) for x in packed.detach().chunk(n)]

        bias = source.in_proj_bias is not None
        ours = cls(source.embed_dim, source.num_heads, source.dropout, bias, source.kdim)
        if source.in_proj_weight is not None:
            weights = copies(source.in_proj_weight, 3)
        else:  # kdim differs from embed_dim
            weights = [copies(getattr(source, f"{x}_proj_weight"))[0] for x in "qkv"]
        ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight = weights
        ours.out_proj.weight = copies(source.out_proj.weight)[0]
        if bias:
            ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias = copies(source.in_proj_bias, 3)
            ours.out_proj.bias = copies(source.out_proj.bias)[0]
        return ours.train(source.training)


@dataclass
class KVCache:
    """Keys and values, (B, H, T, D), of the tokens that forward_cached has seen."""

    k: Tensor | None = None
    v: Tensor | None = None


# -----------------------------------------------------------------------------
# Pictures of weights, (H, Tq, Tk) or (L, H, Tq, Tk)


def plot_attention(weights: Tensor, q_tokens, k_tokens, path: str | Path) -> Path:
    """A PNG: a row per layer, a map per head, one colour scale; grey is exactly 0: masked."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    weights = checked_weights(weights, q_tokens, k_tokens)
    n_layers, n_heads, q_len, k_len = weights.shape
    longest = max(q_len, k_len)
    size = max(1.2, min(0.15 * longest, 5, 30 / max(n_layers, n_heads)))  # inches
    step = math.ceil(0.14 * longest / size)  # 0.14 inches a label
    x_labels = [repr(token)[1:-1][:12] for token in k_tokens[::step]]
    y_labels = [repr(token)[1:-1][:12] for token in q_tokens[::step]]
    cells = weights.masked_fill(weights == 0, math.nan).flatten(0, 1).numpy()
    blues = colormaps["Blues"].with_extremes(bad="0.8")
    fig = Figure(figsize=(size * n_heads + 2, size * n_layers + 1.2), layout="constrained")
    grid = fig.subplots(n_layers, n_heads, squeeze=False, sharex=True, sharey=True)
    for n, axes in enumerate(grid.flat):
        picture = axes.imshow(cells[n], blues, aspect="auto", vmin=0, vmax=weights.max().item())
        axes.set_title(f"layer {n // n_heads + 1} head {n % n_heads + 1}", fontsize=8)
        axes.set_xticks(range(0, k_len, step), x_labels, fontsize=7, rotation=90, parse_math=False)
        axes.set_yticks(range(0, q_len, step), y_labels, fontsize=7, parse_math=False)
    fig.supxlabel("key: looked at", fontsize=9)
    fig.supylabel("query: looks", fontsize=9)
    fig.colorbar(picture, ax=grid, label="weight (grey: masked)", fraction=0.3 / fig.get_figwidth())
    fig.savefig(path, format="png")
    return Path(path)


def checked_weights(weights: Tensor, q_tokens, k_tokens) -> Tensor:
    """(L, H, Tq, Tk) float32 on the CPU; ValueError unless they are weights of these tokens."""
    weights = weights.detach().to("cpu", torch.float32)
    fits = weights.dim() in (3, 4) and weights.shape[-2:] == (len(q_tokens), len(k_tokens))
    if not fits or not ((weights >= 0) & (weights < 1.01)).all():  # bfloat16 rounds 1 up
        expected = f"(H, {len(q_tokens)}, {len(k_tokens)}) in [0, 1]"
        raise ValueError(f"weights must be {expected}, got {list(weights.shape)}: {weights}")
    return weights.clamp(max=1).reshape(-1, *weights.shape[-3:])


def attention_html(weights: Tensor, q_tokens, k_tokens, path: str | Path) -> Path:
    """One page that needs no network: point at a head and a token, read what it looks at."""
    weights = checked_weights(weights, q_tokens, k_tokens)
    # Ten-thousandths. 0, shown as masked, stays 0; nothing else becomes 0.
    stored = (weights * 10_000).round().clamp(min=1).masked_fill(weights == 0, 0).int()
    data = {"queries": list(q_tokens), "keys": list(k_tokens), "weights": stored.tolist()}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no token ends the script
    Path(path).write_text(PAGE.replace("DATA", text), encoding="utf-8")
    return Path(path)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Attention</title>
<style> body { font: 14px system-ui, sans-serif; color: #222; background: #fff }
canvas { width: 160px; height: 160px; margin: 4px; image-rendering: pixelated }
span { display: inline-block; white-space: pre; margin: 1px; padding: 2px; background: #eee }
small { display: block } .on { outline: 3px solid #d60 } </style>
<p>Heads (a row per layer; down: queries, across: keys, grey: masked)</p><div id="heads"></div>
<p>Queries: point at one, here or in a head</p><div id="queries"></div>
<p>Keys: what it looks at (darkest: its largest weight)</p><div id="keys"></div>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id);
const { queries, keys, weights } = JSON.parse($("data").textContent);
const largest = weights.flat(3).reduce((a, b) => Math.max(a, b));
const colour = t => t ? `hsl(210 80% ${97 - 45 * t}%)` : "#ccc";  // white to blue, or grey
let head, query = 0;  // what is looked at: a head's canvas and a query's number

function add(kind, parent, text = "") {
  const element = parent.appendChild(document.createElement(kind));
  element.textContent = text;  // text, never markup
  element.tabIndex = 0;  // the keyboard gets there, too
  return element;
}
function addHead(rows, line) {  // rows[query][key]: a pixel per weight
  const canvas = add("canvas", line), context = canvas.getContext("2d");
  Object.assign(canvas, { rows, width: keys.length, height: queries.length });
  rows.forEach((row, q) => row.forEach((weight, k) => {
    context.fillStyle = colour(weight / largest);
    context.fillRect(k, q, 1, 1);
  }));
  canvas.onfocus = () => look(canvas, query);
  canvas.onmousemove = event => look(canvas, Math.floor(event.offsetY / 161 * queries.length));
}
function look(newHead, newQuery) {
  [head, query] = [newHead, newQuery];
  document.querySelectorAll(".on").forEach(element => element.classList.remove("on"));
  [head, $("queries").children[query]].forEach(element => element.classList.add("on"));
  const row = head.rows[query], top = Math.max(...row);
  [...$("keys").children].forEach((span, k) => {
    span.style.background = colour(row[k] / top);
    span.lastChild.textContent = row[k] ? (row[k] / 10000).toFixed(3) : "-";
  });
}
queries.forEach((token, q) => {
  const span = add("span", $("queries"), token);
  span.onmouseenter = span.onfocus = () => look(head, q);
});
keys.forEach(token => add("small", add("span", $("keys"), token)));
weights.forEach(layer => {
  const line = add("div", $("heads"));
  layer.forEach(rows => addHead(rows, line));
});
look(document.querySelector("canvas"), queries.length - 1);
</script></html>
"""


# -----------------------------------------------------------------------------
# Demo: agreement, an induction head, memory and time


@dataclass
class Settings:
    steps: int = 300  # of training; it answers right after about 100
    max_len: int = 4096  # memory and time are measured at T = 256, 512, ... up to here
    device: str = "auto"  # auto: cuda where there is one, else cpu
    out: str = "out/attention"  # pictures, the page and report.json go here
    seed: int = 0  # same seed, same weights


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


WAYS = {
    "written out": lambda *inputs: scaled_dot_product_attention(*inputs)[0],
    "blockwise": blockwise_attention,
    "fused": fused_attention,
}


def agreement() -> dict[str, float]:
    """Largest difference of each way from the loop, over output and gradients."""
    inputs = [torch.randn(2, 1, 200, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = padding_mask(torch.tensor([0, 180]), 200)  # the first: no key
    found = {}
    for name, attention in {"loop": attention_loop, **WAYS}.items():
        output = attention(*inputs, mask, True)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        found[name] = torch.cat([x.flatten() for x in (output, *gradients)])
    return {name: (found[name] - found["loop"]).abs().max().item() for name in WAYS}


WORDS = "ant bat bee cat cod cow dog eel elk emu fly fox gnu hen hog jay koi owl pig ram rat yak".split()
N_SEEN = 12  # different words in a sequence


def induction_batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n sequences: N_SEEN different words, then all but the last again, shuffled.

    Also, for each word of the second half, place and id of what followed it in the first.
    """
    first = torch.rand(n, len(WORDS)).argsort(dim=1)[:, :N_SEEN]
    order = torch.rand(n, N_SEEN - 1).argsort(dim=1)
    tokens = torch.cat((first, first.gather(1, order)), dim=1)
    return tokens, order + 1, first.gather(1, order + 1)


class InductionModel(nn.Module):
    """Two layers of attention alone: enough to find what followed a word before."""

    def __init__(self, d_model: int = 64, n_heads: int = 2):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), d_model)
        self.positions = nn.Embedding(2 * N_SEEN - 1, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.layers = nn.ModuleList(MultiHeadAttention(d_model, n_heads) for _ in range(2))
        self.head = nn.Linear(d_model, len(WORDS), bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(tokens) + self.positions.weight  # (B, T, C)
        weights = []
        for norm, layer in zip(self.norms[:2], self.layers, strict=True):
            found, w = layer.forward_with_weights(norm(x), causal=True)
            x = x + found
            weights.append(w)
        logits = self.head(self.norms[2](x[:, N_SEEN:]))  # (B, N_SEEN - 1, V)
        return logits, torch.stack(weights)  # (L, B, H, T, T)


def induction(s: Settings) -> dict[str, float]:
    """Train the model, test its answers and maps on fresh sequences."""
    print(f"induction: {N_SEEN} words, then again in another order: what followed each before?")
    model = InductionModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    for step in range(1, s.steps + 1):
        tokens, _, answers = induction_batch(64)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step:4}  loss {loss.item():.4f}")

    tokens, places, answers = induction_batch(500)
    with torch.no_grad():
        logits, weights = model(tokens)
    right = (logits.argmax(dim=-1) == answers).float().mean().item()
    one_back = weights[0].diagonal(-1, dim1=-2, dim2=-1)[..., : N_SEEN - 1].mean((0, 2))  # (H,)
    places = places[:, None, :, None].expand(-1, weights.size(2), -1, 1)  # (N, H, N_SEEN - 1, 1)
    on_answer = weights[1, :, :, N_SEEN:].gather(-1, places).mean((0, 2, 3))  # (H,)
    print(f"  {answers.numel():,} fresh questions: {right:.2%} answered right")
    print(f"  layer 1, better head: {one_back.max():.1%} of its weight on the word before")
    print(f"  layer 2, lesser head: {on_answer.min():.1%} of its weight on the answer")
    words = [WORDS[i] for i in tokens[0].tolist()]
    plot_attention(weights[:, 0], words, words, Path(s.out, "heads.png"))
    attention_html(weights[:, 0], words, words, Path(s.out, "heads.html"))
    return {"exact_match": right, "weight_on_answer": on_answer.min().item()}


def kept_for_backward(attention, *inputs) -> float:
    """MB (2^20 bytes) of the tensors that autograd keeps between forward and backward."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:  # by address: views of one storage count once
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def train_ms(function, *inputs) -> float:
    start = time.perf_counter()
    function(*inputs).sum().backward()
    if torch.accelerator.is_available():  # it works on its own: wait for it
        torch.accelerator.synchronize()
    return 1e3 * (time.perf_counter() - start)


def scaling(max_len: int) -> list[dict]:
    """Memory and time of each way at T = 256, 512, ... max_len (one head, D = 64)."""
    print("     T  way          MB kept for backward   ms forward + backward")
    rows = []
    for length in [2**i for i in range(8, max_len.bit_length())]:
        inputs = torch.randn(3, 1, 1, length, 64, requires_grad=True)
        for name, attention in WAYS.items():
            megabytes = kept_for_backward(attention, *inputs)
            ms = min(train_ms(attention, *inputs) for _ in range(3))
            rows.append({"T": length, "way": name, "MB": megabytes, "ms": ms})
            print(f"{length:6}  {name:11} {megabytes:21.1f} {ms:23.1f}")
    return rows


def benchmark(rounds: int = 3) -> dict:
    """MultiHeadAttention and torch's in turn: median ms, and quartiles of how many times as long."""
    x = torch.randn(32, 256, 256, requires_grad=True)  # (B, T, C)
    theirs = nn.MultiheadAttention(256, 8, batch_first=True)
    ours = MultiHeadAttention.from_torch(theirs)
    ms = {"ours": [], "torch": [], "torch_default": []}
    for _ in range(rounds + 1):  # the first warms up
        ms["ours"].append(train_ms(ours, x))
        ms["torch"].append(train_ms(lambda: theirs(x, x, x, need_weights=False)[0]))
        ms["torch_default"].append(train_ms(lambda: theirs(x, x, x)[0]))  # makes the weights, too
    report = {"shape": {"B": 32, "T": 256, "d_model": 256, "n_heads": 8}, "rounds": rounds}
    print("MultiHeadAttention    ms forward + backward   times as long")
    for name, values in ms.items():
        ratios = [a / b for a, b in zip(values, ms["ours"], strict=True)][1:]
        low, median, high = statistics.quantiles(ratios, n=4)
        report[name] = {"ms": statistics.median(values[1:]), "times": [low, median, high]}
        print(f"{name:14} {report[name]['ms']:29.1f} {median:15.2f}")
    return report


def main(s: Settings) -> None:
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s.seed)
    with pick_device(s.device):  # new tensors and modules go there
        differences = agreement()
        print("largest difference from the loop:", differences)
        report = {"largest_difference": differences, **induction(s)}
        report |= {"scaling": scaling(s.max_len), "benchmark": benchmark()}
    report |= {
        "mha_speedup": report["benchmark"]["torch"]["times"][1],
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": asdict(s),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"look at {out / 'heads.png'} and {out / 'heads.html'}")
    headline = {name: report[name] for name in ("exact_match", "weight_on_answer", "mha_speedup")}
    print(json.dumps(headline | {"report": str(out / "report.json")}))


if __name__ == "__main__":
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    main(tyro.cli(Settings, description=__doc__))
