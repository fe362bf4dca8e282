"""A Transformer encoder that classifies text: positions, attention, LayerNorm, feed-forward, head.

On 2 CPU cores (torch 2.13.0): demo 20 s. Twins are two reviews with the same words in another order and
opposite labels. On unseen twins a bag of words is right on 50%, as chance is, and the encoder on 100%.

    python encoder.py                       # demo: a table, a picture of a head, a line of JSON
    python encoder.py --no-norm-first       # every setting is a flag; --help lists them

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762 (the sections and equations named below);
Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745 (pre-norm).
Shapes: B batch, T tokens, C = d_model, H heads, D = C // H, L layers, K classes.
"""

import copy
import json
import math
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# The concept


@dataclass
class EncoderConfig:
    """Sizes and choices of an encoder. Raises ValueError for what would be silently wrong."""

    vocab_size: int
    max_len: int = 512  # longest sequence, in tokens
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 512  # inner width of the feed-forward net, usually 4 * d_model
    dropout: float = 0.1  # of the embeddings, each sub-layer's output and the pooled vector
    norm_first: bool = True  # pre-norm trains without warm-up; False is the paper's post-norm
    activation: str = "gelu"  # "relu" as in the paper, or "gelu" (exact, with erf)
    n_classes: int = 2
    pad_id: int = 0
    pool: str = "mean"  # "mean", "max", "mean+max" or "first": how T vectors become one

    def __post_init__(self):
        if min(self.n_heads, self.d_model) < 1 or self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model={self.d_model}, got {self.n_heads}")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f'activation must be "relu" or "gelu", got "{self.activation}"')
        if self.pool not in ("mean", "max", "mean+max", "first"):
            raise ValueError(f'pool must be "mean", "max", "mean+max" or "first", got "{self.pool}"')


def sinusoidal_positional_encoding(max_len: int, d_model: int) -> Tensor:
    """Positions as waves (section 3.5): feature 2i is sin(t / 10000^(2i / d_model)), 2i + 1 its cosine.

    Returns (max_len, d_model) float32; an odd d_model has one sine more than cosines.
    """
    # A shift by k tokens rotates each pair of features by one angle: a linear map can say "k tokens back".
    t = torch.arange(max_len, dtype=torch.float64)[:, None]  # (T, 1); float32 would lose digits
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (ceil(C/2),)
    encoding = torch.empty(max_len, d_model, dtype=torch.float64)
    encoding[:, 0::2] = torch.sin(t * frequency)
    encoding[:, 1::2] = torch.cos(t * frequency)[:, : d_model // 2]
    return encoding.float()


class SelfAttention(nn.Module):
    """Multi-head self-attention (section 3.2), softmax(q k' / sqrt(D)) v (eq. 1): attention.py in short."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)  # one product instead of three
        self.out_proj = nn.Linear(d_model, d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, H, T, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C), boolean mask that broadcasts to (B, H, T, T), True = may be attended to."""
        if mask is not None and mask.dtype != torch.bool:  # numbers would be added to the scores
            raise ValueError(f"mask must be boolean (True = may be attended to), got {mask.dtype}")
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # (B, T, C) each
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights (B, H, T, T), which the fused kernel in forward never holds."""
        q, k, _ = self.qkv_proj(x).chunk(3, dim=-1)
        q, k = self.split_heads(q), self.split_heads(k)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, T); scaling q first keeps float16 finite
        if mask is None:
            return scores.softmax(dim=-1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # a row of -inf would give NaN
        return scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # a row with nothing to attend to is 0


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward net on each token, each with residual and LayerNorm (section 3.1).

    post-norm (the paper): x = norm(x + sublayer(x));  pre-norm (norm_first): x = x + sublayer(norm(x)).
    Dropout acts on each sub-layer's output (section 5.4). nn.TransformerEncoderLayer also drops attention
    weights and hidden units of the feed-forward net; without that, attention stays on its fast kernels.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.self_attention = SelfAttention(config.d_model, config.n_heads)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.ffn = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff),
            nn.GELU() if config.activation == "gelu" else nn.ReLU(),
            nn.Linear(config.d_ff, config.d_model),
        )
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C), boolean mask that broadcasts to (B, H, T, T), True = may be attended to.

        Returns (B, T, C). Raises ValueError for a mask that is not boolean.
        """
        if self.norm_first:
            x = x + self.dropout(self.self_attention(self.self_attention_norm(x), mask))
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def forward_with_weights(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, and with it the attention weights (B, H, T, T)."""
        y = self.forward(x, mask)
        attended = self.self_attention_norm(x) if self.norm_first else x
        return y, self.self_attention.weights(attended, mask)

    @staticmethod
    def from_torch(layer: nn.TransformerEncoderLayer) -> "EncoderLayer":
        """The same layer, with copies of torch's parameters (dtype, device and requires_grad, too).

        Raises ValueError for what this layer does not have: batch_first=False, bias=False, other activations.
        """
        attention, given = layer.self_attn, layer.activation
        relu = given is F.relu or isinstance(given, nn.ReLU)
        gelu = given is F.gelu or isinstance(given, nn.GELU) and given.approximate == "none"
        if not relu and not gelu:
            raise ValueError(f'activation must be "relu" or exact "gelu", got {given}')
        if not attention.batch_first or layer.linear1.bias is None:
            raise ValueError("from_torch needs a layer with batch_first=True and bias=True")
        config = EncoderConfig(
            vocab_size=1,  # a layer has no embedding
            d_model=attention.embed_dim,
            n_heads=attention.num_heads,
            d_ff=layer.linear1.out_features,
            dropout=layer.dropout1.p,
            norm_first=layer.norm_first,
            activation="relu" if relu else "gelu",
        )
        ours = EncoderLayer(config)
        ours.self_attention.qkv_proj.weight = copy.deepcopy(attention.in_proj_weight)
        ours.self_attention.qkv_proj.bias = copy.deepcopy(attention.in_proj_bias)
        ours.self_attention.out_proj = copy.deepcopy(attention.out_proj)
        ours.self_attention_norm = copy.deepcopy(layer.norm1)  # with its eps
        ours.ffn[0] = copy.deepcopy(layer.linear1)
        ours.ffn[2] = copy.deepcopy(layer.linear2)
        ours.ffn_norm = copy.deepcopy(layer.norm2)
        return ours.train(layer.training)


class Encoder(nn.Module):
    """Token ids to one vector a token: embedding + positions, layers, and a final LayerNorm if norm_first.

    Pre-norm leaves the residual stream unnormalised, so it is normalised once at the end.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.pad_id = config.pad_id
        self.max_len = config.max_len
        self.scale = math.sqrt(config.d_model)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)  # scaled, as large as the positions
        positions = sinusoidal_positional_encoding(config.max_len, config.d_model)  # (max_len, C)
        # The state dict holds them, too: a model made on the meta device gets them by loading it.
        self.register_buffer("positions", positions.to(self.embedding.weight.dtype))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embedding * sqrt(C) + position (section 3.4), with dropout; and the layers' mask (B, 1, 1, T)."""
        if tokens.size(1) > self.max_len:
            raise ValueError(f"tokens may be max_len={self.max_len} long at most, got {tokens.size(1)}")
        if mask is None:
            mask = tokens != self.pad_id
        if mask.shape != tokens.shape or mask.dtype != torch.bool:  # (B, 1) would broadcast
            raise ValueError(f"mask must be bool {list(tokens.shape)}, got {mask.dtype} {list(mask.shape)}")
        x = self.embedding(tokens) * self.scale + self.positions[: tokens.size(1)]
        return self.dropout(x), mask[:, None, None, :]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 or int32, mask (B, T) boolean, True = a real token (default: tokens != pad_id).

        Returns (B, T, C). Outputs at padding are undefined, and no real token sees them.
        Raises ValueError for T > max_len and for a mask of another shape or dtype.
        """
        x, mask = self.embed(tokens, mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)

    def forward_with_weights(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, and with it the attention weights of all layers (L, B, H, T, T)."""
        x, mask = self.embed(tokens, mask)
        all_weights = []
        for layer in self.layers:
            x, weights = layer.forward_with_weights(x, mask)
            all_weights.append(weights)
        return self.final_norm(x), torch.stack(all_weights)


def pool_tokens(x: Tensor, mask: Tensor, pool: str) -> Tensor:
    """T vectors to one: x (B, T, C), mask (B, T) boolean, True = a real token.

    pool: "mean" or "max" over the real tokens, "mean+max" both side by side, "first" the vector of token 0.
    Returns (B, C), or (B, 2C) for "mean+max". A row of padding alone gives 0.
    """
    padding = ~mask[:, :, None]  # (B, T, 1)
    if pool == "first":
        return x[:, 0].masked_fill(padding[:, 0], 0.0)
    n_real = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1); no 0/0 where there is padding alone
    mean = x.masked_fill(padding, 0.0).sum(1) / n_real  # (B, C)
    if pool == "mean":
        return mean
    largest = x.masked_fill(padding, -math.inf).amax(1).masked_fill(padding.all(1), 0.0)  # (B, C)
    return {"max": largest, "mean+max": torch.cat((mean, largest), dim=-1)}[pool]


class EncoderClassifier(nn.Module):
    """Encoder, pooling, one linear layer: (B, T) token ids to (B, K) logits."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.pool = config.pool
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model * (2 if config.pool == "mean+max" else 1), config.n_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 or int32, mask (B, T) boolean, True = a real token (default: tokens != pad_id).

        Returns logits (B, K); those of a row of padding alone are the head's bias. Raises as Encoder does.
        """
        if mask is None:
            mask = tokens != self.encoder.pad_id
        x = self.encoder(tokens, mask)  # (B, T, C)
        return self.head(self.dropout(pool_tokens(x, mask, self.pool)))


# -----------------------------------------------------------------------------
# Demo data: twins, two reviews with the same words in another order and opposite labels
#
# Whatever only counts words gives both the same answer and is right on one of them: 50%, however large it is.

TWINS = [  # (positive, negative)
    ("they call {it} {bad} , {aside} but it is {good}", "they call {it} {good} , {aside} but it is {bad}"),
    ("critics say {bad} , {aside} i found {it} {good}", "critics say {good} , {aside} i found {it} {bad}"),
    ("what began {bad} , {aside} in the end was {good}", "what began {good} , {aside} in the end was {bad}"),
    ("{it} was not {bad} , {aside} it was {good}", "{it} was not {good} , {aside} it was {bad}"),
    ("{it} was {good} , {aside} and not only for fans", "{it} was not {good} , {aside} and only for fans"),
    ("{it} was not {bad} , {aside} as many say", "{it} was {bad} , {aside} not as many say"),
]
GOOD = "clever charming gripping moving fresh superb witty lovely brilliant warm honest thrilling".split()
BAD = "dull clumsy boring lifeless stale awful witless ugly terrible cold fake tedious".split()
NOUNS = "plot acting music script ending cast dialogue camera story pace hero villain".split()
ASIDES = (
    "as my neighbour said ,|after a long week ,|in a half empty cinema ,|with my sister beside me ,|"
    "on a rainy evening ,|late at night ,|for the price of a ticket ,|to be fair ,|popcorn in hand ,"
).split("|")


def generate_reviews(n: int, seed: int) -> list[tuple[str, int]]:
    """n (even) short reviews (text, label), all different, 1 = positive; 2i and 2i + 1 are twins."""
    rng = random.Random(seed)
    reviews = {}  # text: label
    while len(reviews) < n:
        words = {
            "it": "the " + rng.choice(NOUNS),
            "good": rng.choice(GOOD),
            "bad": rng.choice(BAD),
            "aside": " ".join(rng.sample(ASIDES, rng.randrange(4))),  # up to 3, to keep the others apart
        }
        positive, negative = rng.choice(TWINS)
        reviews[positive.format(**words).replace("  ", " ")] = 1  # without an aside there are two spaces
        reviews[negative.format(**words).replace("  ", " ")] = 0
    return list(reviews.items())


# -----------------------------------------------------------------------------
# Demo: a bag of words, the encoder without positions, the encoder


@dataclass
class Settings:
    epochs: int = 3  # passes over the 6,000 training reviews
    lr: float = 2e-3  # AdamW's learning rate, constant: two layers need no warm-up
    norm_first: bool = True  # pre-norm; --no-norm-first is the paper's post-norm
    device: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda or mps
    out: str = "out/encoder"  # head.png and report.json go here
    seed: int = 0  # same seed, same machine, same threads: same numbers


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train(model: nn.Module, tokens: Tensor, labels: Tensor, s: Settings) -> None:
    """Train on tokens (N, T), labels (N,). s.seed draws the batches, torch's own generator the dropout."""
    generator = torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)
    model.train()
    for _ in range(s.epochs):
        for rows in torch.randperm(len(tokens), generator=generator).split(64):
            loss = F.cross_entropy(model(tokens[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not norm.isfinite():
                sys.exit(f"encoder.py: the gradient is no longer finite; try an --lr below {s.lr}")
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Fraction of labels (N,) that the model predicts for tokens (N, T), without dropout."""
    model.eval()
    predicted = torch.cat([model(batch).argmax(-1) for batch in tokens.split(256)])
    return (predicted == labels).float().mean().item()


@torch.no_grad()
def plot_twins(model: EncoderClassifier, twins: list[str], tokens: Tensor, path: Path) -> None:
    """Twins side by side: where the head looks whose adjective looks at "not" most."""
    from matplotlib.figure import Figure

    positive = model(tokens).softmax(-1)[:, 1]
    weights = model.encoder.forward_with_weights(tokens)[1].cpu().numpy()  # (L, 2, H, T, T)
    words = [text.split() for text in twins]
    on_not = 0.0  # (L, H)
    for i in (0, 1):
        adjective = next(t for t, word in enumerate(words[i]) if word in GOOD)
        on_not += weights[:, i, :, adjective, words[i].index("not")]
    layer, head = divmod(on_not.argmax(), on_not.shape[1])

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for i in (0, 1):
        image = panels[i].imshow(weights[layer, i, head], cmap="Blues", vmin=0, vmax=1)
        panels[i].set_xticks(range(len(words[i])), words[i], rotation=90)
        panels[i].set_yticks(range(len(words[i])), words[i])
        panels[i].set(xlabel="looked at (key)", ylabel="looking (query)")
        panels[i].set_title(f"P(positive) = {positive[i]:.3f}")
    figure.suptitle(f"The same words in another order: layer {layer + 1}, head {head + 1}")
    figure.colorbar(image, ax=panels, label="attention weight (each row sums to 1)", shrink=0.8)
    figure.savefig(path, dpi=110)


def main(s: Settings) -> None:
    device = pick_device(s.device)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    texts, labels = zip(*generate_reviews(8000, s.seed), strict=True)
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: 1 + i for i, word in enumerate(words)}  # 0 is padding
    ids = [torch.tensor([vocabulary[word] for word in text.split()]) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # (8000, T)
    tokens, test_tokens = tokens.split([6000, 2000])
    labels, test_labels = torch.tensor(labels, device=device).split([6000, 2000])
    print("6,000 reviews to learn from and 2,000 others to test, all of them twins, such as:")
    print(f"  positive: {texts[0]}\n  negative: {texts[1]}\n")
    print(f"{'':26}{'test accuracy':>15}{'seconds':>9}")

    rows = []
    for name, n_layers, with_positions in [
        ("bag of words", 0, False),  # without layers it is a mean of words, whatever their order
        ("encoder without positions", 2, False),
        ("encoder", 2, True),
    ]:
        start = time.perf_counter()
        torch.manual_seed(s.seed)
        sizes = {"max_len": 64, "d_model": 64, "n_heads": 4, "n_layers": n_layers, "d_ff": 128}
        model = EncoderClassifier(EncoderConfig(1 + len(words), norm_first=s.norm_first, **sizes)).to(device)
        if not with_positions:
            model.encoder.positions.zero_()
        train(model, tokens, labels, s)
        right = accuracy(model, test_tokens, test_labels)
        seconds = time.perf_counter() - start
        rows.append({"model": name, "accuracy": right, "seconds": seconds})
        print(f"{name:26}{right:15.1%}{seconds:9.1f}", flush=True)
    if right > 0.9:
        print("conclusion: positions bring the order; without them attention sees a bag of words")
    else:
        print("conclusion: none, for the encoder has not learnt it; try another --lr or more --epochs")

    for_fans = [i for i in range(6000, 8000, 2) if "not only for fans" in texts[i]]
    i = min(for_fans, key=lambda i: len(texts[i]))
    plot_twins(model, texts[i : i + 2], torch.stack(ids[i : i + 2]).to(device), out / "head.png")
    report = {
        "rows": rows,
        "settings": asdict(s) | {"device": device.type},
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    summary = {row["model"]: row["accuracy"] for row in rows}
    print(json.dumps(summary | {"report": str(out / "report.json")}))


if __name__ == "__main__":
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    main(tyro.cli(Settings, description=__doc__))
