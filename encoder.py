"""A Transformer encoder that classifies text: positions, attention, LayerNorm, feed-forward, head.

On 2 CPU cores (torch 2.13.0): demo 17 s. On unseen reviews whose sentiment is in the order of the words the
encoder is right on 100.0%; a bag of words, or the encoder without positions, on 75%.

    python encoder.py                       # demo: a table, a picture of a head, a line of JSON
    python encoder.py --no-norm-first       # every setting is a flag

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762 (sections in the docstrings below);
Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745 (pre-norm).
Shapes: B batch, T tokens, C = d_model, H heads, D = C // H, L layers, K classes.
"""

import argparse
import importlib.util
import io
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# The concept


@dataclass
class EncoderConfig:
    """Sizes and choices of an encoder; a wrong one raises ValueError when the config is made."""

    vocab_size: int
    max_len: int = 512  # longest sequence, in tokens
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 512  # inner width of the feed-forward net, usually 4 * d_model
    dropout: float = 0.1  # of the embeddings, each sub-layer's output (paper, 5.4) and the pooled vector
    norm_first: bool = True  # pre-norm trains without warm-up; False is the paper's post-norm
    activation: str = "gelu"  # "relu" as in the paper, or "gelu" (exact, with erf)
    n_classes: int = 2
    pad_id: int = 0
    pool: str = "mean"  # "mean", "max", "mean+max" or "first": how T vectors become one

    def __post_init__(self):
        for name in ("vocab_size", "max_len", "d_model", "n_heads", "n_layers", "d_ff", "n_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            sizes = f"d_model={self.d_model}, n_heads={self.n_heads}"
            raise ValueError(f"n_heads must divide d_model, got {sizes}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id must be an id of the vocabulary, got {self.pad_id}")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f'activation must be "relu" or "gelu", got "{self.activation}"')
        if self.pool not in ("mean", "max", "mean+max", "first"):
            raise ValueError(f'pool must be "mean", "max", "mean+max" or "first", got "{self.pool}"')


def sinusoidal_positional_encoding(max_len: int, d_model: int) -> Tensor:
    """Positions as waves (section 3.5): feature 2i is sin(t / 10000^(2i / d_model)), 2i + 1 its cosine.

    Returns (max_len, d_model) float32; an odd d_model has one sine more than cosines. A shift by k tokens
    rotates each pair by a fixed angle, so that one linear map can express "k tokens back".
    """
    t = torch.arange(max_len, dtype=torch.float64)[:, None]  # (T, 1); float32 would lose digits
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (ceil(C/2),)
    encoding = torch.empty(max_len, d_model, dtype=torch.float64)
    encoding[:, 0::2] = torch.sin(t * frequency)
    encoding[:, 1::2] = torch.cos(t * frequency)[:, : d_model // 2]
    return encoding.float()


class SelfAttention(nn.Module):
    """Multi-head self-attention (section 3.2), in short; a test pins it to attention.py's."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)  # one product instead of three
        self.out_proj = nn.Linear(d_model, d_model)

    def heads(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if mask is not None and mask.dtype != torch.bool:  # the kernel would add numbers to the scores
            raise ValueError(f"mask must be boolean (True = may be attended to), got {mask.dtype}")
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        return qkv[0], qkv[1], qkv[2]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x, mask)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the fused kernel never holds: softmax(q k' / sqrt(D)) (eq. 1), (B, H, T, T)."""
        q, k, _ = self.heads(x, mask)
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T); scaled first: float16
        if mask is None:
            return scores.softmax(dim=-1)
        lowest = torch.finfo(scores.dtype).min  # -inf alone in a row would give NaN
        scores = scores.masked_fill(~mask, lowest)
        return scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # nothing to attend to: 0, not uniform


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward net on each token, each with residual and LayerNorm (section 3.1).

    post-norm (the paper): x = norm(x + sublayer(x));  pre-norm (norm_first): x = x + sublayer(norm(x)).
    Dropout acts on each sub-layer's output (section 5.4). nn.TransformerEncoderLayer also drops attention
    weights and hidden units of the feed-forward net; without that, attention stays on its fast kernels.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = SelfAttention(config.d_model, config.n_heads)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.ffn = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff),
            nn.GELU() if config.activation == "gelu" else nn.ReLU(),
            nn.Linear(config.d_ff, config.d_model),
        )
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C); mask, of 2 to 4 dimensions, broadcasts to (B, H, T, T), True = may be attended to.
        Returns (B, T, C)."""
        C = self.ffn[0].in_features
        if x.dim() != 3 or x.size(-1) != C:
            raise ValueError(f"x must be (B, T, C={C}), got {list(x.shape)}")
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask))
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def forward_with_weights(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, and with it the attention weights (B, H, T, T)."""
        y = self.forward(x, mask)
        return y, self.attention.weights(self.attention_norm(x) if self.norm_first else x, mask)

    @staticmethod
    def from_torch(layer: nn.TransformerEncoderLayer) -> "EncoderLayer":
        """The same layer with the weights of torch's copied into it (dtype and device too).

        Raises ValueError for what this layer does not have: batch_first=False, bias=False, other activations.
        """
        attention, activation = layer.self_attn, layer.activation
        relu = activation is F.relu or isinstance(activation, nn.ReLU)
        gelu = activation is F.gelu or isinstance(activation, nn.GELU) and activation.approximate == "none"
        if not (relu or gelu):
            raise ValueError(f'activation must be "relu" or exact "gelu", got {activation}')
        if not attention.batch_first or layer.linear1.bias is None or attention.add_zero_attn:
            raise ValueError("from_torch needs a layer with batch_first=True, bias=True, no add_zero_attn")
        sizes = {"n_heads": attention.num_heads, "d_ff": layer.linear1.out_features}
        choices = {"norm_first": layer.norm_first, "activation": "relu" if relu else "gelu"}
        config = EncoderConfig(
            vocab_size=1, d_model=attention.embed_dim, dropout=layer.dropout1.p, **sizes, **choices
        )
        ours = EncoderLayer(config).to(layer.linear1.weight)
        ours.attention_norm.eps, ours.ffn_norm.eps = layer.norm1.eps, layer.norm2.eps
        theirs = {"attention.out_proj": attention.out_proj, "ffn.0": layer.linear1, "ffn.2": layer.linear2}
        theirs |= {"attention_norm": layer.norm1, "ffn_norm": layer.norm2}
        state = {f"{name}.{k}": x for name, module in theirs.items() for k, x in module.named_parameters()}
        state |= {"attention.qkv_proj.weight": attention.in_proj_weight}
        state |= {"attention.qkv_proj.bias": attention.in_proj_bias}
        ours.load_state_dict(state)
        return ours.train(layer.training)


class Encoder(nn.Module):
    """Token ids to one vector a token: embedding + positions, layers, and a final LayerNorm if norm_first.

    A pre-norm layer returns the bare sum of all residuals, so the last one needs that norm; a post-norm layer
    ends in one.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.pad_id, self.max_len, self.scale = config.pad_id, config.max_len, math.sqrt(config.d_model)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # times scale, below: as large as the positions
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        positions = sinusoidal_positional_encoding(config.max_len, config.d_model)
        self.register_buffer("positions", positions, persistent=False)  # (max_len, C)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, C): embedding * sqrt(C) + position (section 3.4), then dropout."""
        if tokens.dim() != 2 or (tokens.dtype != torch.int64 and tokens.dtype != torch.int32):
            raise ValueError(f"tokens must be (B, T) int32 or int64, got {tokens.dtype} {list(tokens.shape)}")
        T = tokens.size(1)
        if T > self.max_len:
            raise ValueError(f"a sequence may have at most max_len={self.max_len} tokens, got {T}")
        return self.dropout(self.embedding(tokens) * self.scale + self.positions[:T])

    def attention_mask(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which tokens may be attended to: (B, T) or the default, tokens != pad_id, as (B, 1, 1, T)."""
        if mask is None:
            mask = tokens != self.pad_id
        if mask.dtype != torch.bool or mask.shape != tokens.shape:
            raise ValueError(f"mask must be bool {list(tokens.shape)}, got {mask.dtype} {list(mask.shape)}")
        return mask[:, None, None, :]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) integers, mask (B, T) boolean, True = a real token (default: tokens != pad_id).

        Returns (B, T, C); what stands there at padding means nothing, and no real token sees it.
        Raises ValueError for T > max_len and for other shapes or dtypes.
        """
        x, mask = self.embed(tokens), self.attention_mask(tokens, mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)

    def forward_with_weights(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, and with it the attention weights of all layers (L, B, H, T, T)."""
        x, mask = self.embed(tokens), self.attention_mask(tokens, mask)
        weights = []
        for layer in self.layers:
            x, w = layer.forward_with_weights(x, mask)
            weights.append(w)
        return self.final_norm(x), torch.stack(weights)


class EncoderClassifier(nn.Module):
    """Encoder, pooling, one linear layer: (B, T) token ids to (B, K) logits.

    pool: "mean" and "max" over the real tokens, "mean+max" both side by side, "first" the vector of token 0.
    A row of padding alone pools to 0, so its logits are the head's bias.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, self.pool_kind = config, config.pool
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model * (2 if config.pool == "mean+max" else 1), config.n_classes)

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, C), mask (B, T) to (B, C), or (B, 2C) for "mean+max"."""
        real = mask[:, :, None]  # (B, T, 1)
        if self.pool_kind == "first":
            return x[:, 0] * real[:, 0]
        mean = (x * real).sum(1) / real.sum(1).clamp(min=1)  # (B, C) no 0/0 where there is padding alone
        if self.pool_kind == "mean":
            return mean
        largest = x.masked_fill(~real, -math.inf).amax(1).masked_fill(~real.any(1), 0.0)  # (B, C)
        return largest if self.pool_kind == "max" else torch.cat((mean, largest), dim=-1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) integers, T >= 1, mask (B, T) boolean (default: tokens != pad_id). Returns logits
        (B, K). Raises ValueError as Encoder.forward does, and for T = 0: there is nothing to pool."""
        if tokens.size(-1) < 1:
            raise ValueError(f"tokens must be (B, T >= 1), got {list(tokens.shape)}")
        if mask is None:
            mask = tokens != self.encoder.pad_id
        return self.head(self.dropout(self.pool(self.encoder(tokens, mask), mask)))


# -----------------------------------------------------------------------------
# Demo data: reviews whose sentiment is in the order of the words
#
# Half of them are twins: the same words in another order, and the opposite label. Whatever only counts words
# gives both the same answer and is wrong on one: it is right on half of the twins, however large it is, and
# with the plain half of the reviews on 75%. Without positions an encoder sees no order either: same ceiling.


def opposite(template: str) -> str:
    """The template with {good} and {bad} exchanged."""
    return template.replace("{good", "{?").replace("{bad", "{good").replace("{?", "{bad")


SWAPPED = [  # positive; the opposite has the same words
    "i expected {it} to be {bad} , {aside} but it was {good}",
    "{it} was not {bad} at all , {aside} it was {good}",
    "critics call {it} {bad} , {aside} yet i found it {good}",
    "what began {bad} became , {aside} in the end , {good}",
    "nobody found {it} , {aside} {bad} at all but all {good}",
]
MOVED = [  # (positive, negative): "not" stands at another place
    ("{it} was {good} , {aside} and not only for fans", "{it} was not {good} , {aside} and only for fans"),
    ("{it} was not {bad} , {aside} as many say", "{it} was {bad} , {aside} not as many say"),
]
TWINS = [(template, opposite(template)) for template in SWAPPED] + MOVED
PLAIN = [  # the adjectives alone tell
    "a {good} film , {aside} {it} was {good2}",
    "{aside} {it} was {good} and the rest {good2}",
    "{good} from the start , {aside} and {it} {good2}",
]
PLAIN = [(template, opposite(template)) for template in PLAIN]
GOOD = "clever charming gripping moving fresh superb witty lovely brilliant warm honest thrilling".split()
BAD = "dull clumsy boring lifeless stale awful witless ugly terrible cold fake tedious".split()
NOUNS = "plot acting music script ending cast dialogue camera story pace hero villain".split()
ASIDES = (
    "as my neighbour said ,|after a long week ,|in a half empty cinema ,|with my sister beside me ,|"
    "on a rainy evening ,|whatever the poster says ,|late at night ,|for the price of a ticket ,|"
    "and i have seen many ,|to be fair ,|three rows from the screen ,|popcorn in hand ,"
).split("|")


def generate_reviews(n: int, seed: int) -> list[tuple[str, int]]:
    """n different short reviews (text, label), 1 = positive; 2i and 2i + 1 are a pair, one of each label.

    Every other pair is twins. Raises ValueError unless n is even and in 2..100,000.
    """
    if n % 2 or not 0 < n <= 100_000:
        raise ValueError(f"the number of reviews must be even and in 2..100000 (they come in pairs), got {n}")
    rng, reviews, seen = random.Random(seed), [], set()
    while len(reviews) < n:
        templates = rng.choice(PLAIN if len(reviews) % 4 else TWINS)
        (good, good2), (bad, bad2) = rng.sample(GOOD, 2), rng.sample(BAD, 2)
        aside = " ".join(rng.sample(ASIDES, rng.randrange(4)))  # up to 3, between words that belong together
        words = {"good": good, "good2": good2, "bad": bad, "bad2": bad2, "aside": aside}
        words["it"] = f"the {rng.choice(NOUNS)}"
        positive, negative = (" ".join(template.format(**words).split()) for template in templates)
        if not {positive, negative} & seen:
            seen |= {positive, negative}
            reviews += [(positive, 1), (negative, 0)]
    return reviews


def word_counting_ceiling(reviews: list[tuple[str, int]]) -> float:
    """The accuracy that no function of word counts can pass on these reviews, even if it knows the labels."""
    labels: dict[tuple, list[int]] = {}
    for text, label in reviews:
        labels.setdefault(tuple(sorted(text.split())), []).append(label)
    return sum(max(ones := sum(group), len(group) - ones) for group in labels.values()) / len(reviews)


# -----------------------------------------------------------------------------
# Demo: a bag of words, the encoder without positions, the encoder


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    n_train: int = setting(
        6000, "generated reviews to learn from (a multiple of 4: pairs of twins and others in turn)"
    )
    n_test: int = setting(2000, "other reviews, none of them in the training set")
    d_model: int = setting(64, "width")
    n_heads: int = setting(4, "heads of 16 dimensions: enough to single out a word")
    n_layers: int = setting(2, "one finds the word that turns the meaning, one applies it")
    d_ff: int = setting(128, "inner width of the feed-forward net; small words need no more")
    dropout: float = setting(0.1, "of embeddings and sub-layers")
    norm_first: bool = setting(True, "pre-norm; --no-norm-first is the paper's post-norm")
    activation: str = setting("gelu", "relu or gelu")
    pool: str = setting("mean", "mean, max, mean+max or first")
    epochs: int = setting(4, "passes over the training reviews")
    batch_size: int = setting(64, "reviews a step")
    lr: float = setting(3e-3, "AdamW's peak learning rate, reached after 5% of the steps, then a cosine to 0")
    device: str = setting("auto", "auto (cuda, then cpu), cuda, cpu or mps")
    out: str = setting("out/encoder", "picture and report.json go here")
    seed: int = setting(0, "same seed, same machine, same threads: same numbers")


def encode_words(reviews: list[tuple[str, int]], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Reviews as ids (N, T), 0 = padding, and labels (N,)."""
    ids = [torch.tensor([vocabulary[word] for word in text.split()]) for text, _ in reviews]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([label for _, label in reviews])


def train(model: nn.Module, tokens: Tensor, labels: Tensor, s: Settings) -> None:
    """AdamW on the cross-entropy, warm-up and cosine, gradients clipped. Batches are drawn from s.seed,
    dropout from torch's own generator."""
    generator = torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.01)
    steps = s.epochs * math.ceil(len(tokens) / s.batch_size)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(s.epochs):
        for rows in torch.randperm(len(tokens), generator=generator).split(s.batch_size):
            loss = F.cross_entropy(model(tokens[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def predict(model: nn.Module, tokens: Tensor) -> Tensor:
    """Labels (N,) for ids (N, T), without dropout."""
    model.eval()
    return torch.cat([model(rows).argmax(-1) for rows in tokens.split(256)])


def demo(s: Settings, device: torch.device) -> dict:
    """Trains the three models on the same reviews, prints a table, draws a picture; returns the report."""
    need("sklearn", "matplotlib")
    reviews = generate_reviews(s.n_train + s.n_test, s.seed)
    train_set, test_set = reviews[: s.n_train], reviews[s.n_train :]
    words = sorted({word for text, _ in reviews for word in text.split()})
    vocabulary = {word: 1 + i for i, word in enumerate(words)}  # 0 is padding
    tokens, labels = (t.to(device) for t in encode_words(train_set, vocabulary))
    test_tokens, test_labels = (t.to(device) for t in encode_words(test_set, vocabulary))
    is_twin = torch.arange(s.n_train, len(reviews)) % 4 < 2  # (n_test,)
    print(f"{s.n_train:,} reviews to learn from, {s.n_test:,} others to test, {len(words)} words; twins:")
    print(f"  positive: {reviews[0][0]}\n  negative: {reviews[1][0]}")

    def row(name: str, predicted: Tensor, start: float) -> dict:
        right = (predicted == test_labels).cpu()
        parts = {"accuracy": right, "twins": right[is_twin], "plain": right[~is_twin]}
        shares = {part: round(r.float().mean().item(), 4) for part, r in parts.items()}
        return {"model": name} | shares | {"seconds": round(time.perf_counter() - start, 1)}

    start = time.perf_counter()
    rows = [row("bag of words, logistic regression", bag_of_words(train_set, test_set).to(device), start)]
    given = {f.name for f in fields(EncoderConfig)} & {f.name for f in fields(Settings)}
    config = EncoderConfig(1 + len(words), max_len=64, **{name: getattr(s, name) for name in given})
    for name in ("encoder without positions", "encoder"):
        start = time.perf_counter()
        torch.manual_seed(s.seed)
        model = EncoderClassifier(config).to(device)
        if name == "encoder without positions":
            model.encoder.positions.zero_()
        train(model, tokens, labels, s)
        rows.append(row(name, predict(model, test_tokens), start))
    ceiling = word_counting_ceiling(test_set)
    print(f"\n{'test accuracy':36s}{'all':>7s}{'twins':>8s}{'plain':>8s}{'seconds':>9s}")
    for r in rows:
        print(f"{r['model']:36s}{r['accuracy']:7.1%}{r['twins']:8.1%}{r['plain']:8.1%}{r['seconds']:9.1f}")
    print(f"{'ceiling for whatever counts words':36s}{ceiling:7.1%}")
    print("conclusion: order is what the positions bring; without them attention is a bag of words")
    picture = plot_twins(model, test_set, vocabulary, Path(s.out) / "head.png")
    n_parameters = sum(p.numel() for p in model.parameters())
    return {"rows": rows, "ceiling": ceiling, "n_parameters": n_parameters, "picture": str(picture)}


def bag_of_words(train_set: list[tuple[str, int]], test_set: list[tuple[str, int]]) -> Tensor:
    """Labels that logistic regression on word counts predicts for the test set."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = zip(*train_set, strict=True)
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(texts, labels)
    return torch.from_numpy(model.predict([text for text, _ in test_set]))


@torch.no_grad()
def plot_twins(model: EncoderClassifier, test_set: list, vocabulary: dict, path: Path) -> Path:
    """Twins side by side: where the head looks that gives "not" the most weight from the word it turns."""
    from matplotlib.figure import Figure

    model.eval()
    texts = [text for text, _ in test_set if "only for fans" in text]
    twins = min(zip(texts[::2], texts[1::2], strict=True), key=lambda pair: len(pair[0]))
    device = model.head.weight.device
    views = []  # (words, P(positive), weights (L, H, T, T)) of each twin
    for text in twins:
        words = text.split()
        tokens = torch.tensor([[vocabulary[word] for word in words]], device=device)
        weights = model.encoder.forward_with_weights(tokens)[1][:, 0].cpu()
        views.append((words, model(tokens).softmax(-1)[0, 1].item(), weights))
    on_not = torch.zeros(views[0][2].shape[:2])  # (L, H)
    for words, _, weights in views:
        turned = next(i for i, word in enumerate(words) if word in GOOD + BAD)
        on_not += weights[:, :, turned, words.index("not")]
    layer, head = divmod(int(on_not.argmax()), on_not.size(1))

    fig, png = Figure(figsize=(9, 4.6), layout="constrained"), io.BytesIO()
    panels = fig.subplots(1, 2)
    for axes, (words, p, weights) in zip(panels, views, strict=True):
        image = axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(words)), words, rotation=90)
        axes.set_yticks(range(len(words)), words)
        axes.set(xlabel="looked at (key)", ylabel="looking (query)", title=f"P(positive) = {p:.3f}")
    fig.suptitle(f"The same words in another order: layer {layer + 1}, head {head + 1}")
    fig.colorbar(image, ax=panels, label="attention weight (each row sums to 1)", shrink=0.8)
    fig.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())
    return path


# -----------------------------------------------------------------------------


def need(*modules: str) -> None:
    """Raises ValueError that names the libraries that the demo needs and this Python lacks."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
        raise ValueError(f"the demo needs {names}: pip install {names}")


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for f in fields(Settings):
        reason = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=reason, **kind)
    s = Settings(**vars(parser.parse_args(argv)))
    for name in ("n_train", "epochs", "batch_size", "lr"):
        if getattr(s, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(s, name)}")
    if s.n_test < 400 or s.n_train % 4 or s.n_test % 4:
        raise ValueError(
            f"n_train, n_test must be multiples of 4, n_test >= 400, got {s.n_train}, {s.n_test}"
        )
    return s


def pick_device(name: str) -> torch.device:
    """For "auto" cuda where there is one, else cpu. Raises ValueError for one that is missing."""
    try:
        device = torch.device(name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f'device "{name}" is not available here; accepted: auto, cuda, cpu, mps') from None
    return device


def hardware() -> dict:
    """What a time means little without: CPU, threads, GFLOP/s of an fp32 matmul of 1024^3 (median), torch."""
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    a, seconds = torch.rand(1024, 1024), []
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    gflops = round(2 * 1024**3 / statistics.median(seconds[2:]) / 1e9)  # the first two warm up
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gemm_gflops": gflops, "torch": torch.__version__}


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main(argv: list[str] | None = None) -> None:
    s = settings_from_command_line(argv)
    device = pick_device(s.device)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=s.out).close()  # a place that can't be written is known before the work
    machine = hardware()
    chosen = asdict(s) | {"device": device.type, "dtype": "float32"}
    print(" ".join(f"{name}={value}" for name, value in (chosen | machine).items()))
    start = time.perf_counter()
    report = demo(s, device) | {"settings": chosen} | machine
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend: one line, no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
