"""Sentiment of movie reviews: encoder.py's Transformer trained from scratch on IMDB, and used.

On 2 CPU cores (torch 2.13.0): 87.69 ± 0.23% of IMDB's test reviews right after 89 s of training (3 seeds);
TF-IDF + logistic regression: 90.36%.

    python classify_imdb.py                                  # finds or downloads IMDB, trains, tests, reports
    python classify_imdb.py --data aclImdb_v1.tar.gz         # or the unpacked folder
    python classify_imdb.py --predict "A film to remember."  # by the trained model; or a file, or - for stdin
    python classify_imdb.py --baseline                       # the linear model to compare with

The same command goes on where it was stopped. Data: Maas et al., "Learning Word Vectors for Sentiment
Analysis", ACL 2011. Tokenizer: byte-level BPE (Sennrich et al., arXiv:1508.07909) of the training reviews.
Shapes: B batch, T tokens, K = 2 classes (0 negative, 1 positive), N reviews.
"""

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder import (
    EncoderClassifier,
    EncoderConfig,
    generate_reviews,
    hardware,
    need,
    pick_device,
    setting,
    write_atomically,
)

# -----------------------------------------------------------------------------
# Settings

PRESETS = {  # what differs from the defaults below; every setting can still be given as a flag
    "fast": {},
    "best": {"d_model": 128, "d_ff": 512, "n_layers": 2, "epochs": 3, "amp": "auto"},
}


@dataclass
class Settings:
    data: str = setting(os.environ.get("IMDB_DATA", ""), "IMDB, tarball or folder; empty: cache, or download")
    preset: str = setting("fast", "fast: a few minutes on two cores; best: an hour")
    out: str = setting("out/classify_imdb", "model, checkpoint, report and pictures go here")
    seed: int = setting(0, "same seed, same machine, same threads: same weights")
    predict: str | None = setting(None, "classify a text, a file's or (for -) stdin's lines; no training")
    baseline: bool = setting(False, "train and test TF-IDF + logistic regression instead")
    shuffle_labels: bool = setting(False, "honesty check: learn shuffled labels; the test must give 50%")
    device: str = setting("", "cuda, mps or cpu; empty: cuda where there is one, else cpu")
    amp: str = setting("off", "bf16 autocast: off (faster while d_model is 64), auto (if native) or bf16")
    vocab_size: int = setting(16000, "ids: padding, mask, then byte-level BPE")
    max_len: int = setting(512, "tokens a review, of a longer one its two ends; 256 lost a point on dev")
    d_model: int = setting(64, "width; 128 was slower and no better on dev")
    n_heads: int = setting(2, "heads of 32 dimensions")
    n_layers: int = setting(1, "a second layer took 1.6 times as long for 0.3 points on dev")
    d_ff: int = setting(256, "inner width of the feed-forward net, 4 x d_model")
    dropout: float = setting(0.1, "of embeddings, sub-layers and the pooled vector")
    pool: str = setting("mean+max", "mean, max, mean+max or first")
    mask_words: float = setting(
        0.2, "share of the training tokens hidden behind the mask id; 0.3 lost a point"
    )
    epochs: int = setting(2, "passes over the training reviews")
    batch_size: int = setting(32, "reviews a step, of similar length")
    lr: float = setting(1e-3, "AdamW's peak learning rate, then a cosine to 0; 2e-3 lost 0.8 points")
    warmup: int = setting(100, "steps from 0 to the peak")
    weight_decay: float = setting(0.01, "on matrices; none on norms and biases")
    clip: float = setting(1.0, "largest norm of the gradient")
    save_every: float = setting(30.0, "seconds between checkpoints")


FREE = {"data", "out", "predict", "baseline", "device", "save_every"}  # may differ when a run goes on

# -----------------------------------------------------------------------------
# IMDB: find, download, read, check, split

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SIZE, IMDB_MD5 = 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"
IMDB_FINGERPRINT = "c0558bb3f7a59d911d7feb3a63a5b6fe521df6f27bffaf8ae32b05f75e6a877b"
FOLDERS = ("train/pos", "train/neg", "test/pos", "test/neg")
PER_FOLDER = 12_500


class Review(NamedTuple):
    number: int  # within its folder; neighbours are often about the same film
    label: int  # 1 = positive
    text: str


def find_imdb(data: str) -> Path:
    """The path given, else the tarball in the cache, downloaded if it isn't there. Raises OSError."""
    if data:
        return Path(data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imdb" / "aclImdb_v1.tar.gz"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        download(IMDB_URL, cache, IMDB_SIZE, IMDB_MD5)
    return cache


def download(url: str, path: Path, size: int, md5: str) -> None:
    """Fetch url to path, which exists once it is complete and right. Raises OSError.

    What arrived before a break stays in PATH.part; the next attempt, now or in a later run, gets the rest.
    An attempt that brings nothing is the last one. A file with another md5 is thrown away.
    """
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    with tqdm(total=size, unit="B", unit_scale=True, desc="downloading IMDB", mininterval=1, delay=1) as bar:
        while (have := part.stat().st_size if part.exists() else 0) < size:
            bar.update(have - bar.n)
            try:
                fetch_rest(url, part, have, bar)
                problem = "the connection broke off"
            except urllib.error.HTTPError as error:
                raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
            except OSError as error:  # no network, no such host, reset, timed out
                problem = str(getattr(error, "reason", error))
            if not part.exists() or part.stat().st_size <= have:
                raise OSError(f"{url}: {problem} after {have:,} of {size:,} bytes")
    with open(part, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            part.unlink()
            raise OSError(f"{url}: what arrived has another md5 than the published file; it was thrown away")
    os.replace(part, path)


def fetch_rest(url: str, part: Path, have: int, bar) -> None:
    """Append the bytes from have on to part; a server that can't continue sends all, and part begins anew."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=20) as response:
        with open(part, "ab" if response.status == 206 else "wb") as file:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def read_imdb(path: Path) -> dict[str, list[Review]]:
    """The reviews of "train" and "test", sorted by folder and number, from the tarball or unpacked folder.

    Nothing is unpacked, so no path in a tarball can escape. ValueError unless all 4 x 12,500 are there.
    """
    if not path.exists():
        raise ValueError(f"data: {path} does not exist; give aclImdb_v1.tar.gz or the folder aclImdb")
    found: dict[str, dict[tuple[int, int], str]] = {folder: {} for folder in FOLDERS}
    for name, data in files_in_folder(path) if path.is_dir() else files_in_tarball(path):
        match = re.fullmatch(r"(?:.*/)?((?:train|test)/(?:pos|neg))/(\d+)_(\d+)\.txt", name)
        if match:
            found[match[1]][int(match[2]), int(match[3])] = data.decode("utf-8", errors="replace")
    for folder, texts in found.items():
        if len(texts) != PER_FOLDER:
            raise ValueError(f"data: {path} has {len(texts):,} reviews in {folder}, IMDB has {PER_FOLDER:,}")
    return {
        split: [
            Review(number, int(folder.endswith("pos")), text)
            for folder in FOLDERS
            if folder.startswith(split)
            for (number, _), text in sorted(found[folder].items())
        ]
        for split in ("train", "test")
    }


def files_in_folder(path: Path):
    """(name, bytes) of each file in the four folders; path is aclImdb or the folder that holds it."""
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            raise ValueError(f"data: {path} has no folder {folder}; needed are {', '.join(FOLDERS)}")
        for file in (root / folder).iterdir():
            yield f"{folder}/{file.name}", file.read_bytes()


def files_in_tarball(path: Path):
    """(name, bytes) of its files.

    The gzip stream is read to its end, where the checksum stands: tarfile stops before that, and skips a
    damaged tail without a word.
    """
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name, tar.extractfile(member).read()
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data: {path} is truncated, altered, or no .tar.gz ({error})") from None


def dev_numbers(per_class: int) -> set[int]:
    """Review numbers of the dev split: five blocks of consecutive ones, a tenth of all in each class.

    Neighbours are often about the same film, so a random tenth shares its films with the training set and
    flatters by a point or more; the test set has other films.
    """
    period, length = per_class // 5, per_class // 50
    return {number for number in range(per_class) if 0 <= number % period - period * 2 // 5 < length}


def split_dev(reviews: list[Review]) -> tuple[list[Review], list[Review]]:
    """(train, dev): see dev_numbers."""
    numbers = dev_numbers(len(reviews) // 2)
    return [r for r in reviews if r.number not in numbers], [r for r in reviews if r.number in numbers]


def clean(text: str) -> str:
    """The text in lower case, each white space or line break of the data set (<br />) a single blank."""
    return " ".join(text.replace("<br />", " ").lower().split())


def shared_texts(one: list[Review], other: list[Review]) -> int:
    """How many reviews of other have the words of one in one, whatever the case and punctuation."""
    words = {" ".join(re.findall(r"\w+", clean(r.text))) for r in one}
    return sum(" ".join(re.findall(r"\w+", clean(r.text))) in words for r in other)


def demo_reviews(seed: int) -> dict[str, list[Review]]:
    """encoder.py's generated reviews in the place of IMDB's: 8,000 to train (dev included), 2,000 to test."""
    reviews = [Review(i // 2, label, text) for i, (text, label) in enumerate(generate_reviews(10_000, seed))]
    return {"train": reviews[:8000], "test": reviews[8000:]}


# -----------------------------------------------------------------------------
# Tokenizer

PAD, MASK, SPECIAL = 0, 1, 2  # ids 0 and 1; BPE's own ids follow
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"  # no token crosses these pieces


class Tokenizer:
    """Byte-level BPE, so that any text has an encoding. ranks: the tokens' bytes, in id order."""

    def __init__(self, ranks: list[bytes]):
        import tiktoken

        self.ranks, self.vocab_size = ranks, SPECIAL + len(ranks)
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        self.bpe = tiktoken.Encoding("reviews", pat_str=WORDS, mergeable_ranks=mergeable, special_tokens={})

    @staticmethod
    def train(texts: list[str], vocab_size: int) -> "Tokenizer":
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - SPECIAL, pattern=WORDS)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return Tokenizer([bytes(token) for token, _ in by_rank])

    def encode(self, texts: list[str], max_len: int) -> list[Tensor]:
        """ids (T,) of each text, T <= max_len: of a longer text its first and last max_len / 2 tokens."""
        texts, head = [clean(text) for text in texts], max_len // 2
        encoded = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        short = (ids if len(ids) <= max_len else ids[:head] + ids[head - max_len :] for ids in encoded)
        return [torch.tensor(ids, dtype=torch.long) + SPECIAL for ids in short]


def pad(ids: list[Tensor]) -> Tensor:
    """Encoded texts as one (B, T), T the longest of them and at least 1."""
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return tokens if tokens.size(1) else torch.full((len(ids), 1), PAD)


def batches(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """All indices once, in batches of similar length, in random order: little padding, and still a shuffle.

    Rows are shuffled, cut into groups of 50 batches, and sorted by length within a group only.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    out = []
    for start in range(0, len(order), 50 * batch_size):
        group = sorted(order[start : start + 50 * batch_size], key=lambda i: lengths[i])
        out += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    rng.shuffle(out)
    return out


# -----------------------------------------------------------------------------
# Checkpoints


def save(path: Path, state: dict) -> None:
    """Write state as one file, at once or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict:
    """What save wrote; no code in it is run. Raises ValueError for anything else, one altered byte too."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load itself doesn't look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damage can surface as anything
        state = None
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path} is damaged or no checkpoint of this script; delete it to start anew")
    return state


# -----------------------------------------------------------------------------
# Training and testing

EVALUATIONS = 4  # on the dev split, evenly spread over a run


def train(model: nn.Module, data: dict, s: Settings, run: dict, path: Path, device: torch.device) -> None:
    """Train from step run["step"] to the last; run, weights and optimizer are saved to path every so often.

    data: {"train": (ids, labels), "dev": (ids, labels)}. All randomness of a step is a function of seed and
    step, so a run that goes on needs no generator's state to end with the very same weights. After Ctrl-C or
    SIGTERM it saves and raises Interrupted.
    """
    ids, labels = data["train"]
    targets = torch.tensor(labels)
    steps_per_epoch = math.ceil(len(ids) / s.batch_size)
    steps = s.epochs * steps_per_epoch
    evaluate_at = {round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    optimizer = make_optimizer(model, s)
    if run["step"]:
        optimizer.load_state_dict(run["optimizer"])
    signals, progress, saved = Signals(), Progress(run["step"], steps), time.monotonic()
    for epoch in range(run["step"] // steps_per_epoch, s.epochs):
        order = batches([len(x) for x in ids], s.batch_size, seed=s.seed * 1_000_003 + epoch)
        for rows in order[run["step"] % steps_per_epoch :]:
            start = time.perf_counter()
            model.train()
            torch.manual_seed(s.seed * 1_000_003 + run["step"])
            tokens, target = pad([ids[i] for i in rows]).to(device), targets[rows].to(device)  # (B, T), (B,)
            hidden = (torch.rand(tokens.shape) < s.mask_words).to(device) & (tokens != PAD)
            with torch.autocast(device.type, torch.bfloat16, enabled=run["bf16"]):
                logits = model(tokens.masked_fill(hidden, MASK)).float()  # (B, K)
            loss = F.cross_entropy(logits, target)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run["step"], steps, s)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            run["step"] += 1
            run["right"] += (logits.argmax(-1) == target).sum().item()
            run["seen"] += len(rows)
            run["seconds"] += time.perf_counter() - start
            progress.show(run["step"], loss.item())
            if run["step"] in evaluate_at:
                progress.say(record_dev(model, data["dev"], run, device))
            if signals.received or run["step"] == steps or time.monotonic() - saved > s.save_every:
                run["total_seconds"] = time.perf_counter() - run["start"]
                save(path, run | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                saved = time.monotonic()
            if signals.received:
                progress.bar.close()
                raise Interrupted(signals.received, f"step {run['step']} of {steps} is saved in {path}")
    signals.restore()
    progress.bar.close()


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """AdamW; weight decay pulls matrices to 0, but not norms and biases, which have no reason to be small."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, fused=True)


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up, then half a cosine to 0; the first step is 0."""
    return s.lr * min((step + 1) / s.warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def probabilities(model: nn.Module, ids: list[Tensor], device: torch.device, bf16: bool = False) -> Tensor:
    """P(positive) of encoded texts, (N,) in their order; in batches of similar length, each text once."""
    model.eval()
    out = torch.empty(len(ids))
    for rows in torch.tensor([len(x) for x in ids]).argsort().split(64):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(pad([ids[i] for i in rows]).to(device)).float()  # (B, K)
        out[rows] = logits.softmax(-1)[:, 1].cpu()
    return out


def record_dev(model: nn.Module, dev: tuple, run: dict, device: torch.device) -> str:
    """Add dev accuracy, and training accuracy since the last time, to the history; returns them as text."""
    p, labels = probabilities(model, dev[0], device, run["bf16"]), torch.tensor(dev[1])
    row = {"step": run["step"], "seconds": round(run["seconds"], 1)}
    row["train_accuracy"] = round(run["right"] / run["seen"], 4)
    row["dev_accuracy"] = accuracy(p, labels)
    row["dev_loss"] = round(F.binary_cross_entropy(p, labels.float()).item(), 4)
    run["history"].append(row)
    run["right"] = run["seen"] = 0
    return "   ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items())


def accuracy(p: Tensor, labels: Tensor) -> float:
    """Share of p = P(positive) (N,) on the side of 0.5 that labels (N,) say."""
    return round(((p > 0.5) == labels.bool()).double().mean().item(), 5)


class Interrupted(Exception):
    """Ended by a signal, with what was done saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Signals:
    """Notes Ctrl-C and SIGTERM, so that no step is left half done; a second one ends the process at once."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, _frame) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """A bar with rate and time left on a terminal, else a line every 15 seconds (both on stderr)."""

    def __init__(self, step: int, steps: int):
        from tqdm import tqdm

        self.steps, self.first, self.start, self.said = steps, step, time.monotonic(), time.monotonic()
        self.bar = tqdm(initial=step, total=steps, unit="step", disable=None)  # None: not without a terminal

    def show(self, step: int, loss: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.said > 15:
            left = (now - self.start) / (step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}, loss {loss:.3f}, {left:.0f} s left", file=sys.stderr)
            self.said = now

    def say(self, line: str) -> None:
        self.bar.clear()
        print(line, flush=True)


# -----------------------------------------------------------------------------
# The job: data, tokenizer, training, test, report


def classify(s: Settings) -> dict:
    """The whole job, or what is left of it. Returns the report, which is also in OUT/report.json."""
    need("tiktoken", "rustbpe", "matplotlib", "tqdm")
    start = time.perf_counter()
    out, device = Path(s.out), pick_device(s.device)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # a place that can't be written is known before the work
    dataset, reviews = load_reviews(s)
    run = earlier_run(s, dataset, reviews, out)
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["settings"] == run["settings"]:
            print(f"this run is finished; another one needs another --out than {out}")
            return report
    run["start"] = start - run["total_seconds"]  # as if the earlier parts of this run had just gone before
    run["bf16"] = choose_bf16(s.amp, device)
    machine = hardware() | {"dtype": "bf16 autocast" if run["bf16"] else "float32"}
    chosen = asdict(s) | {"dataset": dataset, "device": device.type} | machine
    print(" ".join(f"{name}={value}" for name, value in chosen.items() if value not in (None, "")))

    train_set, dev_set = split_dev(reviews["train"])
    if not run["ranks"]:
        run["ranks"] = Tokenizer.train([clean(r.text) for r in train_set], s.vocab_size).ranks
    tokenizer = Tokenizer(run["ranks"])
    data = {"train": encoded(tokenizer, train_set, s), "dev": encoded(tokenizer, dev_set, s)}
    model = make_model(s, tokenizer.vocab_size)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train_set):,} reviews to learn from, {len(dev_set):,} dev, {len(reviews['test']):,} test,")
    print(f"{tokenizer.vocab_size:,} token ids, {n_parameters:,} parameters", flush=True)
    if run["step"]:
        model.load_state_dict(run["model"])
        print(f"going on at step {run['step']}", flush=True)
    train(model.to(device), data, s, run, out / "checkpoint.pt", device)

    flops = s.epochs * training_flops(model.config, [len(x) for x in data["train"][0]])
    report = {
        "dataset": dataset,
        "test_accuracy": test(model, tokenizer, reviews["test"], run["settings"], out, device),
        "dev_accuracy": run["history"][-1]["dev_accuracy"],
        "train_seconds": round(run["seconds"], 1),
        "total_seconds": round(time.perf_counter() - run["start"], 1),
        "n_parameters": n_parameters,
        "preset": s.preset,
        "seed": s.seed,
        "mfu": round(flops / run["seconds"] / (machine["gemm_gflops"] * 1e9), 3),
        "test_texts_also_in_train": shared_texts(reviews["train"], reviews["test"]),
    }
    report |= machine | {"history": run["history"], "settings": run["settings"]}
    plot_curves(run["history"], out / "curves.png")
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())
    return report


def encoded(tokenizer: Tokenizer, reviews: list[Review], s: Settings) -> tuple[list[Tensor], list[int]]:
    """(ids, labels) of reviews to learn from; the labels in another order where s.shuffle_labels."""
    labels = [r.label for r in reviews]
    if s.shuffle_labels:
        random.Random(s.seed).shuffle(labels)
    return tokenizer.encode([r.text for r in reviews], s.max_len), labels


def load_reviews(s: Settings) -> tuple[str, dict[str, list[Review]]]:
    """("imdb", its reviews), or ("demo", generated ones) after a banner if none are given nor to be had."""
    try:
        path = find_imdb(s.data)
    except OSError as error:
        print("!" * 100)
        print("!!  IMDB WAS NOT FOUND AND COULD NOT BE DOWNLOADED. What follows is NOT about IMDB: it runs")
        print("!!  on short reviews generated by a grammar, to show that all of it works here.")
        print(f"!!  Why: {error}")
        print(f"!!  What to do: fetch {IMDB_URL}")
        print("!!  where there is a network, then: python classify_imdb.py --data aclImdb_v1.tar.gz")
        print("!" * 100, flush=True)
        return "demo", demo_reviews(s.seed)
    reviews = read_imdb(path)
    if fingerprint(reviews) != IMDB_FINGERPRINT:
        print("note: these are not exactly the published texts; results don't compare with those of others")
    return "imdb", reviews


def fingerprint(reviews: dict[str, list[Review]]) -> str:
    """sha256 of all labels and texts in order."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for review in reviews[split]:
            digest.update(f"{review.label}{review.text}\0".encode())
    return digest.hexdigest()


def earlier_run(s: Settings, dataset: str, reviews: dict[str, list[Review]], out: Path) -> dict:
    """The state of the run in out, or a new one. Raises ValueError where it isn't the run asked for."""
    wanted = {name: value for name, value in asdict(s).items() if name not in FREE}
    wanted |= {"dataset": dataset, "texts": fingerprint(reviews)}
    new = {"settings": wanted, "ranks": [], "step": 0, "seconds": 0.0, "total_seconds": 0.0}
    new |= {"right": 0, "seen": 0, "history": []}
    path = out / "checkpoint.pt"
    if not path.exists():
        return new
    run = load(path)
    if (run["settings"].get("dataset"), dataset) == ("demo", "imdb"):
        print(f"the run in {out} was on demo data; starting anew on IMDB")
        return new
    names = [name for name in wanted if run["settings"].get(name) != wanted[name]]
    if names:
        there = run["settings"]
        differences = ", ".join(f"{name} {there.get(name)} there, {wanted[name]} now" for name in names)
        raise ValueError(f"{path} is of another run ({differences}); give another --out, or delete it")
    return run


def choose_bf16(amp: str, device: torch.device) -> bool:
    """Whether to train in bf16; "auto": where the hardware has it, others emulate it slowly."""
    if amp == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return amp == "bf16"


def make_model(s: Settings, vocab_size: int) -> EncoderClassifier:
    torch.manual_seed(s.seed)
    shared = {f.name for f in fields(EncoderConfig)} & {f.name for f in fields(Settings)}
    given = {name: getattr(s, name) for name in shared} | {"vocab_size": vocab_size}
    return EncoderClassifier(EncoderConfig(**given, pad_id=PAD))


def training_flops(config: EncoderConfig, lengths: list[int]) -> float:
    """Floating-point operations of one epoch: the layers' matrix products on real tokens, and twice as many
    backward. Padding, softmax, norms and the embedding's look-up are left out."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    weights = 4 * config.d_model**2 + 2 * config.d_model * config.d_ff  # of a layer
    return 3.0 * config.n_layers * (2 * weights * tokens + 4 * config.d_model * pairs)


def test(model, tokenizer, reviews: list[Review], settings: dict, out: Path, device) -> float:
    """Accuracy on the test set, which is read here and nowhere else; writes model, mistakes and a picture."""
    ids = tokenizer.encode([r.text for r in reviews], model.config.max_len)
    p = probabilities(model, ids, device)  # (N,)
    labels = torch.tensor([r.label for r in reviews])
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    state = {"settings": settings, "config": asdict(model.config), "ranks": tokenizer.ranks, "model": weights}
    save(out / "model.pt", state)
    right_p = torch.where(labels == 1, p, 1 - p)  # (N,) the probability of the right answer
    mistakes = []
    for i in right_p.argsort()[:20].tolist():
        mistake = {"label": LABELS[reviews[i].label], "probability": round(right_p[i].item(), 4)}
        mistakes.append(mistake | {"text": reviews[i].text})
    write_atomically(out / "mistakes.json", json.dumps(mistakes, indent=1).encode())
    print(f"\ntest accuracy {accuracy(p, labels):.2%} on {len(reviews):,} reviews ({settings['dataset']})")
    print(f"the most wrong of them (20 are in {out / 'mistakes.json'}):")
    for mistake in mistakes[:5]:
        print(
            f"  {mistake['label']} (given {mistake['probability']:.1%}): ... {clean(mistake['text'])[-90:]}"
        )
    plot_confusion(p > 0.5, labels == 1, out / "confusion.png")
    return accuracy(p, labels)


def plot_curves(history: list[dict], path: Path) -> None:
    plt = pyplot()
    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    seconds = [row["seconds"] for row in history]
    for name, label in (("train_accuracy", "training, words hidden"), ("dev_accuracy", "dev, other films")):
        axes.plot(seconds, [100 * row[name] for row in history], "o-", label=label)
    axes.set(xlabel="training time (s)", ylabel="accuracy (%)", title="Learning curves")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_confusion(predicted: Tensor, actual: Tensor, path: Path) -> None:
    plt = pyplot()
    counts = torch.bincount(2 * actual.long() + predicted.long(), minlength=4).view(2, 2)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    fig, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for a in (0, 1):
        for b in (0, 1):
            color = "white" if share[a, b] > 0.5 else "black"
            axes.text(b, a, f"{counts[a, b]:,}\n{share[a, b]:.1%}", ha="center", va="center", color=color)
    axes.set(xticks=(0, 1), yticks=(0, 1), xticklabels=LABELS, yticklabels=LABELS)
    axes.set(xlabel="predicted", ylabel="actual", title="Test set: reviews by label")
    fig.colorbar(image, label="share of the row")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# -----------------------------------------------------------------------------
# Prediction, and the linear model to compare with

LABELS = ("negative", "positive")


def predict(s: Settings) -> None:
    """A line of JSON for each text: label, its probability, the text."""
    need("tiktoken")
    path = Path(s.out) / "model.pt"
    if not path.exists():
        raise ValueError(f"predict: there is no {path} yet; train a model first: python classify_imdb.py")
    is_file = os.path.isfile(s.predict)  # False also for what is no possible file name
    if is_file or s.predict == "-":
        data = Path(s.predict).read_bytes() if is_file else sys.stdin.buffer.read()
        # Lines of bytes end at \n, \r alone; lines of str also at what IMDB's reviews have inside (\x85).
        texts = [line.decode("utf-8", errors="replace") for line in data.splitlines()]
    else:
        texts = [s.predict]
    if not any(text.strip() for text in texts):
        raise ValueError("predict: there is no text to classify")
    state = load(path)
    tokenizer, model = Tokenizer(state["ranks"]), EncoderClassifier(EncoderConfig(**state["config"]))
    model.load_state_dict(state["model"])
    device = pick_device(s.device)
    p = probabilities(model.to(device), tokenizer.encode(texts, model.config.max_len), device)
    for text, positive in zip(texts, p.tolist(), strict=True):
        answer = {"label": LABELS[positive > 0.5], "probability": round(max(positive, 1 - positive), 4)}
        print(json.dumps(answer | {"text": text}))


def baseline(s: Settings) -> dict:
    """TF-IDF of words and pairs, logistic regression: what a Transformer has to beat; returns a report."""
    need("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    Path(s.out).mkdir(parents=True, exist_ok=True)
    dataset, reviews = load_reviews(s)
    train_set, dev_set = split_dev(reviews["train"])
    fit_start = time.perf_counter()
    tfidf = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=200)
    model.fit(tfidf.fit_transform([clean(r.text) for r in train_set]), [r.label for r in train_set])
    seconds = time.perf_counter() - fit_start
    report = {"model": "TF-IDF 1-2-grams + logistic regression", "dataset": dataset}
    for name, part in (("dev", dev_set), ("test", reviews["test"])):
        right = model.score(tfidf.transform([clean(r.text) for r in part]), [r.label for r in part])
        report[f"{name}_accuracy"] = round(right, 4)
    report |= {"train_seconds": round(seconds, 1), "total_seconds": round(time.perf_counter() - start, 1)}
    report |= {"n_parameters": model.coef_.size + 1} | hardware()
    write_atomically(Path(s.out, "baseline.json"), json.dumps(report, indent=1).encode())
    return report


# -----------------------------------------------------------------------------


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Settings):
        reason = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        kind = (
            {"action": "store_true"} if f.type is bool else {"type": str if f.name == "predict" else f.type}
        )
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=reason, **kind)
    preset = parser.parse_args(argv).preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset}")
    parser.set_defaults(**PRESETS[preset])
    s = Settings(**vars(parser.parse_args(argv)))
    for name in ("epochs", "batch_size", "lr", "warmup", "clip"):
        if getattr(s, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(s, name)}")
    if s.vocab_size < SPECIAL + 256:
        raise ValueError(f"vocab_size must be at least {SPECIAL + 256} (all bytes), got {s.vocab_size}")
    if not 0 <= s.mask_words < 1:
        raise ValueError(f"mask_words must be in [0, 1), got {s.mask_words}")
    if s.amp not in ("auto", "bf16", "off"):
        raise ValueError(f"amp must be auto, bf16 or off, got {s.amp}")
    make_model(s, vocab_size=SPECIAL + 256)  # wrong sizes are known before the work
    return s


def main(argv: list[str] | None = None) -> None:
    s = settings_from_command_line(argv)
    if s.predict is not None:
        predict(s)
    else:
        print(json.dumps(baseline(s) if s.baseline else classify(s)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend: one line, no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupted:
        print(f"interrupted: {interrupted}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved so far", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
