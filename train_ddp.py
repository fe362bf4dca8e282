"""Data-parallel training that gives the same weights on any number of processes, and survives being killed.

A byte-level GPT learns Python's own manual, 465,000 bytes that every Python has (PSF License): 36 s on two
cores of an Intel Xeon (torch 2.13.0). Two processes make 1.90 times the tokens a second of one; 60 times
kill -9 at random moments, and 60 times the final weights are bit for bit those of an undisturbed run.

    python train_ddp.py                                   # one process
    python train_ddp.py --data-parallel                   # nn.DataParallel, and why nobody should: see wrap
    torchrun --nproc_per_node=8 train_ddp.py              # DDP: gloo on CPU, nccl on GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ddp.py
    torchrun --nnodes=1:4 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ddp.py

The last one is elastic: nodes may come and go (set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it: without,
torch 2.13 hangs on scaling up). The same command goes on where it stopped, on any number of processes.

DDP: Li et al. 2020, arXiv:2006.15704. GPT: Radford et al. 2019. Copy what is above "Training" (processes,
checkpoints: they need torch alone) and the loop in train.
"""

import argparse
import gc
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# -----------------------------------------------------------------------------
# Settings


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    steps: int = setting(500, "optimizer steps in all; the learning rate falls to nearly 0 by the last")
    batch_size: int = setting(16, "sequences a step, over all processes and micro-batches; any number")
    accumulate: int = setting(1, "micro-batches a process takes for a step: the same step in less memory")
    max_len: int = setting(128, "tokens (here bytes) the model looks back")
    d_model: int = setting(128, "width")
    n_heads: int = setting(4, "heads of attention; divides d_model")
    n_layers: int = setting(3, "blocks")
    dropout: float = setting(0.0, "share of features dropped; 0: the data is seen a few times only")
    lr: float = setting(4e-3, "peak learning rate of AdamW")
    warmup: int = setting(50, "steps up to the peak, then a cosine down to 0")
    weight_decay: float = setting(0.1, "on matrices; norms and biases have no reason to be small")
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: none")
    dtype: str = setting("float32", "of the weights: float32 or float64 (to compare runs exactly)")
    amp: str = setting("off", "off, bf16 (pays where the hardware has it) or fp16 (older GPUs; scaled loss)")
    eval_every: int = setting(100, "steps between two looks at the held-out text")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end")
    keep: int = setting(3, "checkpoints kept; older ones are deleted")
    timeout: float = setting(120.0, "seconds that any wait for another process may take")
    data_parallel: bool = setting(False, "nn.DataParallel in one process instead of DDP: to see, not to use")
    device: str = setting("auto", "auto (cuda, then cpu), cuda, cpu or mps")
    out: str = setting("out/train_ddp", "checkpoints, final.pt, picture and report.json go here")
    seed: int = setting(0, "same seed, same weights; without dropout on any number of processes")


# may change in a run:
FREE = ("eval_every", "save_every", "keep", "timeout", "data_parallel", "device", "out")

# -----------------------------------------------------------------------------
# The model: a compact GPT


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). x (B, T, C)."""

    def __init__(self, d_model: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = n_heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """tokens (B, T) of 0 .. 255, T <= max_len -> logits (B, T, 256) of the next byte."""

    def __init__(self, d_model: int, n_heads: int, n_layers: int, max_len: int, dropout: float = 0.0):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.max_len = max_len
        self.embedding, self.position = nn.Embedding(256, d_model), nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # GPT-2: what is added to the residual stream 2 n_layers times starts smaller
                deep = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layers) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"tokens must be (B, T <= {self.max_len}), got {list(tokens.shape)}")
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V), tied to the embedding


# -----------------------------------------------------------------------------
# The data: who trains on what is a function of (seed, step), the same on every process


@dataclass
class Sequences:
    """tokens (N, T + 1) uint8; the first lengths[i] + 1 of row i are text: inputs and, one on, targets."""

    tokens: Tensor
    lengths: Tensor  # (N,) targets in a row

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """rows (B,) -> inputs (B, T), targets (B, T); -100, which cross_entropy ignores, behind the end."""
        tokens = self.tokens[rows].long()  # (B, T + 1)
        behind = torch.arange(tokens.shape[1] - 1) >= self.lengths[rows, None]  # (B, T)
        return tokens[:, :-1].to(device), tokens[:, 1:].masked_fill(behind, -100).to(device)


def load_manual(max_len: int) -> tuple[Sequences, Sequences]:
    """The help texts of Python's manual, cut into pieces of max_len bytes: (train, dev), each byte once.

    Every tenth topic is held out. The last piece of a topic is shorter than the others.
    """
    from pydoc_data.topics import topics  # what help("topics") shows; licence: PSF License, as Python's own

    texts = sorted(set(topics.values()))
    return cut([t for i, t in enumerate(texts) if i % 10 != 9], max_len), cut(texts[9::10], max_len)


def cut(texts: list[str], max_len: int) -> Sequences:
    """Every byte of the texts as a target once, max_len of them a row."""
    rows = []
    for text in texts:
        data = b"\n" + text.encode()  # the first byte of a text is predicted from a line's end
        rows += [data[i : i + max_len + 1] for i in range(0, len(data) - 1, max_len)]  # overlap by one
    lengths = torch.tensor([len(row) - 1 for row in rows])
    padded = b"".join(row.ljust(max_len + 1, b"\0") for row in rows)
    return Sequences(torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(rows), -1), lengths)


def rows_of_step(step: int, n: int, batch_size: int, seed: int) -> Tensor:
    """The whole batch of a step, (batch_size,) of 0 .. n - 1: an endless row of shuffles, cut into batches.

    Needs nothing but its arguments: any process can tell any step's batch, so a run goes on exactly where it
    stopped, on another number of processes too.
    """
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    parts = []
    for epoch in (places // n).unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        parts.append(torch.randperm(n, generator=generator)[places[places // n == epoch] % n])
    return torch.cat(parts)


# -----------------------------------------------------------------------------
# Processes: start, agree, leave


class Lost(Exception):
    """Another process is gone, or did not come in time."""


@dataclass
class Processes:
    """This process among all: rank of world, and its device. A world of one has no process group."""

    rank: int
    world: int
    device: torch.device


def start_processes(device: str = "auto", timeout: float = 120.0) -> Processes:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE, ...), or be the only one.

    timeout: seconds that any wait for another process may take, here and later. Raises ValueError for a
    device that isn't there, Lost if not all processes arrive.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu", "mps"):
        raise ValueError(f"device must be auto, cuda, cpu or mps, got {device}")
    if device == "mps" and (world > 1 or not torch.backends.mps.is_available()):
        raise ValueError(f"device mps: needs a Mac's GPU and one process, got {world} process(es)")
    if device == "cuda":
        if local_rank >= (have := torch.cuda.device_count()):
            raise ValueError(f"device cuda: process {local_rank} of this machine needs a GPU, it has {have}")
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    processes = Processes(rank, world, torch.device(device))
    if world > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(f"WORLD_SIZE is {world}, but MASTER_ADDR isn't set: start with torchrun")
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=timeout)
        with waiting(f"{world} processes to meet at {host}:{port}", processes, timeout):
            # torchrun keeps the store while it restarts workers, with the addresses of those that died in it
            # (torch 2.13). A prefix for each attempt hides them; nodes may count attempts differently, so on
            # several it takes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (a new store for each) instead.
            is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = dist.TCPStore(host, port, world, is_host, limit)
            one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "several nodes"
            store = dist.PrefixStore(attempt, store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return processes


@contextmanager
def waiting(what: str, processes: Processes, timeout: float | None = None):
    """Around what needs the other processes: says what was waited for if they don't answer."""
    try:
        yield
    except RuntimeError as error:  # gloo, nccl and the store raise subclasses of it
        if processes.world == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        limit = f" for up to {timeout:g} s" if timeout else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Lost(f"rank {processes.rank} waited{limit} for {what}; in vain: {reason}") from error


def on_rank_0(action, processes: Processes):
    """What action() returns on rank 0, on every rank; and its ValueError, OSError or ImportError likewise, so
    that either all go on or all stop. For what is done once for all: reading and writing files."""
    answer = [(None, None)]
    if processes.rank == 0:
        try:
            answer = [(action(), None)]
        except (ValueError, OSError, ImportError) as error:
            answer = [(None, error)]
    if processes.world > 1:
        with waiting("rank 0's files", processes):
            dist.broadcast_object_list(answer)
    result, error = answer[0]
    if error is not None:
        error.of_all = True  # rank 0 alone has to say it
        raise error
    return result


def sum_over_ranks(values: list[float], processes: Processes) -> list[float]:
    """Each value summed over all processes, in float64. Every rank has to come here."""
    if processes.world == 1:
        return values
    on_gpu = processes.device.type == "cuda"
    total = torch.tensor(values, dtype=torch.float64, device=processes.device if on_gpu else "cpu")
    with waiting("a sum over all ranks", processes):
        dist.all_reduce(total)
        return total.tolist()  # on a GPU this is what waits


def share_of_mean(loss_sum: Tensor, n_total: int, world: int) -> Tensor:
    """What to call backward() on, so that all ranks and micro-batches together give the gradient of the mean.

    loss_sum: () sum of the losses of this micro-batch's tokens (or samples). n_total: how many there are in
    the step's whole batch, on all ranks. DDP divides the sum of gradients by world; times world undoes that.
    A mean of the ranks' means would be wrong where they hold unequal numbers of tokens.
    """
    return loss_sum * (world / n_total)


def leave(code: int):
    """End this process now; for the end of main. Never returns.

    gloo's threads can abort the interpreter while it shuts down, after all work is done (pytorch#190489:
    SIGABRT, "terminate called without an active exception"). os._exit skips that, and whatever else is
    registered with atexit. After a failure the group isn't torn down: that may wait for the others.
    """
    if dist.is_initialized() and code == 0:
        gc.collect()
        dist.destroy_process_group()
    try:
        sys.stdout.flush()
    except OSError as error:  # its reader has gone (`| head`), or the disk is full
        code = code or 2
        print(f"{Path(__file__).name}: stdout: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


# -----------------------------------------------------------------------------
# Checkpoints: whole, checked, or not there


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 3) -> Path:
    """Write FOLDER/step_00000050.SHA256.pt; then all but the newest keep are deleted. Returns its path.

    state: tensors, numbers, strings, lists and dicts alone, so that it loads with weights_only=True. The
    file's sha256 is part of its name: both get there in the one move. On a full disk: OSError, and the older
    ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = folder / f"step_{step:08}.{digest}.pt"
    for leftover in folder.glob("step_*.part"):  # of a process that was killed while it wrote
        leftover.unlink()
    write_atomically(path, buffer.getvalue())
    for other in finished_checkpoints(folder):
        if (
            other.name.startswith(f"step_{step:08}.") and other != path
        ):  # of the same step: this is the newest
            other.unlink()
    for old in finished_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def finished_checkpoints(folder: Path) -> list[Path]:
    """Those of save_checkpoint, oldest first; not what other programs have called step_*.pt."""
    name = re.compile(r"step_\d{8,}\.[0-9a-f]{64}\.pt")
    return [path for path in sorted(folder.glob("step_*.pt")) if name.fullmatch(path.name)]


def load_checkpoint(folder: Path) -> dict | None:
    """The newest undamaged state in folder, None if there is none. Damaged files are reported and renamed to
    .damaged, so that the next newest is taken, now and later. Runs no code from a file."""
    for path in reversed(finished_checkpoints(folder)):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        print(f"{path} is damaged (sha256 isn't that of its name); taking the one before", file=sys.stderr)
        path.rename(path.with_suffix(".damaged"))
    return None


# -----------------------------------------------------------------------------
# Training


def wrap(model: nn.Module, p: Processes, data_parallel: bool = False) -> nn.Module:
    """The model that forward goes through: its gradients become the mean over all processes.

    nn.DataParallel is one process with a thread a GPU: Python's lock is shared, the model is copied to every
    GPU in every step, all logits come back to the first one, it can't leave the machine, and it isn't
    developed any more. On CPU it would only call the module: no gain at all.
    """
    if data_parallel and p.device.type == "cuda":
        return nn.DataParallel(model)
    if p.world == 1:
        return model
    with waiting("all ranks to compare their model", p):
        gpu = [p.device.index] if p.device.type == "cuda" else None
        return DistributedDataParallel(model, gpu, forward_sync_buffers=False)  # buffers are constants here


AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, s: Settings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, norms and biases don't. Unfused on CPU: there the fused one
    rounds differently at different places of a tensor."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def learning_rate(step: int, s: Settings) -> float:
    """At step 0 .. steps - 1: linear warm-up, then half a cosine to 0."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))


def train(model: GPT, data: tuple[Sequences, Sequences], run: dict, s: Settings, p: Processes) -> None:
    """From step run["step"] to the last, with checkpoints; raises Interrupted after Ctrl-C or SIGTERM.

    All randomness of a step (batch, dropout) is a function of seed and step, and so is the learning rate:
    a checkpoint that knows the step needs no generator's, sampler's or scheduler's state to go on exactly.
    """
    from tqdm import tqdm

    (text, dev), parts, signals = data, p.world * s.accumulate, Signals(p)
    parallel, optimizer = wrap(model, p, s.data_parallel), make_optimizer(model, s, p.device)
    scaler = torch.amp.GradScaler(p.device.type, enabled=s.amp == "fp16")  # fp16 loses small gradients
    autocast = torch.autocast(p.device.type, AMP.get(s.amp), enabled=s.amp != "off")
    if run["step"]:
        optimizer.load_state_dict(run.pop("optimizer"))
        scaler.load_state_dict(run["scaler"])
    bar = tqdm(initial=run["step"], total=s.steps, unit="step", disable=None if p.rank == 0 else True)
    for step in range(run["step"], s.steps):
        start = time.perf_counter()
        rows = rows_of_step(step, len(text.lengths), s.batch_size, s.seed)  # (batch_size,)
        n_tokens = text.lengths[rows].sum().item()  # of all ranks and micro-batches
        loss_sum = torch.zeros((), device=p.device)
        for micro in range(s.accumulate):
            part = micro * p.world + p.rank  # 0 .. parts - 1
            x, y = text.batch(rows[part::parts], p.device)  # (B, T) each
            torch.manual_seed((s.seed * 1_000_003 + step) * 4_096 + part)  # dropout
            last_one = micro == s.accumulate - 1
            with gradients_travel(parallel, now=last_one), waiting(f"the gradients of step {step}", p):
                with autocast:
                    logits = parallel(x).to(model.norm.weight.dtype)  # (B, T, V); DDP's forward waits, too
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")  # ()
                scaler.scale(share_of_mean(loss, n_tokens, p.world)).backward()
            loss_sum = loss_sum + loss.detach()
        scaler.unscale_(optimizer)  # before clipping, or it would clip scaled gradients
        if s.clip:
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # Signals reach the ranks at different steps; the sum that each step makes anyway tells all at once.
        mean_loss, ints, terms = sum_over_ranks([loss_sum.item() / n_tokens, *signals.received()], p)
        check_finite(mean_loss, step)
        run["step"], run["tokens"] = step + 1, run["tokens"] + n_tokens
        run["seconds"] += time.perf_counter() - start
        run["loss"].append(mean_loss)
        bar.update()
        last, stopped = run["step"] == s.steps, ints + terms > 0
        if last or run["step"] % s.eval_every == 0:
            run["dev"].append([run["step"], check_finite(evaluate(model, dev, p), step)])
            say_losses(run, s, bar, p)
        if last or stopped or (s.save_every and run["step"] % s.save_every == 0):
            state = run | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scaler": scaler.state_dict(), "torch": str(torch.__version__)}
            path = on_rank_0(partial(save_checkpoint, Path(s.out), run["step"], state, s.keep), p)
        if stopped and not last:
            raise Interrupted(signal.SIGTERM if terms else signal.SIGINT, f"step {run['step']} is in {path}")
    bar.close()
    signals.restore()


def gradients_travel(parallel: nn.Module, now: bool):
    """Around forward AND backward of a micro-batch: the ranks exchange gradients with a step's last one alone
    (DDP decides in forward: no_sync around backward only would change nothing)."""
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not now else nullcontext()


def check_finite(loss: float, step: int) -> float:
    """The loss; ValueError where training has diverged."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: try a smaller --lr, or --clip 1")
    return loss


def say_losses(run: dict, s: Settings, bar, p: Processes) -> None:
    """A line from rank 0: training and held-out loss, speed."""
    if p.rank == 0:
        losses = f"loss {run['loss'][-1]:.3f}, held out {run['dev'][-1][1]:.3f} nats a byte"
        bar.clear()
        print(f"step {run['step']}/{s.steps}: {losses}, {run['tokens'] / run['seconds']:,.0f} tokens/s")
        sys.stdout.flush()


@torch.no_grad()
def evaluate(model: GPT, text: Sequences, p: Processes) -> float:
    """Mean loss of all tokens of text, nats: each row on one rank, once (DistributedSampler repeats some)."""
    model.eval()
    loss_sum, mine = 0.0, torch.arange(len(text.lengths))[p.rank :: p.world]
    for rows in mine.split(64):
        x, y = text.batch(rows, p.device)
        loss_sum += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return sum_over_ranks([loss_sum], p)[0] / text.lengths.sum().item()


@torch.no_grad()
def generate(model: GPT, prompt: str, n_bytes: int, device, temperature=0.6, seconds=math.inf) -> str:
    """The prompt and n_bytes more, drawn from the model; below 1, temperature prefers what is likely. Fewer
    where that takes more seconds (the other ranks wait meanwhile)."""
    until = time.monotonic() + seconds
    model.eval()
    tokens = torch.tensor([list(b"\n" + prompt.encode())], device=device)  # (1, T)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_bytes):
        # max_len - 1: no later query ever looks back at the last position, so it learns more slowly.
        logits = model(tokens[:, 1 - model.max_len :])[0, -1]  # (V,)
        drawn = (logits.cpu().double() / temperature).softmax(-1).multinomial(1, generator=generator)
        tokens = torch.cat((tokens, drawn.to(device)[None]), dim=1)
        if time.monotonic() > until:
            break
    text = bytes(tokens[0].tolist()).decode(errors="replace").strip()
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)  # no codes for the terminal


class Interrupted(Exception):
    """Ended by a signal, with what was done saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Signals:
    """Notes Ctrl-C and SIGTERM, so that no step is left half done. A second one ends a lone process at once;
    of several none ends before all have saved: torchrun waits for that, by default 30 s."""

    def __init__(self, p: Processes):
        self.noted, self.alone = [], p.world == 1
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, _frame) -> None:
        self.noted.append(number)
        if self.alone:
            signal.signal(number, signal.SIG_DFL)

    def received(self) -> tuple[int, int]:
        """How many SIGINT, how many SIGTERM."""
        return self.noted.count(signal.SIGINT), self.noted.count(signal.SIGTERM)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# The job: resume or start, train, write


def bound(s: Settings, text: Sequences) -> dict:
    """What must be the same in all parts of a run and on all ranks."""
    settings = {name: value for name, value in asdict(s).items() if name not in FREE}
    return settings | {"text": hashlib.sha256(text.tokens.numpy().tobytes()).hexdigest()[:16]}


def differences(there: dict, here: dict) -> str:
    """Which settings differ, with both values, as text."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def check_settings(s: Settings, p: Processes, settings: dict) -> None:
    """Raises ValueError, on every rank, for settings that can't be, or that the ranks don't share."""
    if p.world > 1:
        of_ranks = [None] * p.world
        with waiting("the settings of all ranks", p):  # save_every too makes ranks wait for others
            mine = {name: str(value) for name, value in (asdict(s) | settings).items()}  # nan isn't nan
            dist.all_gather_object(of_ranks, mine)
        for rank, others in enumerate(of_ranks):
            if others != of_ranks[0]:
                wrong = differences(others, of_ranks[0])
                raise ValueError(f"rank {rank} was started with other settings than rank 0: {wrong}")
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "max_len": 2, "d_model": 1, "n_heads": 1}
    least |= {"n_layers": 1, "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0, "eval_every": 1, "seed": 0}
    for name, value in (least | {"save_every": 0, "keep": 1}).items():
        if not getattr(s, name) >= value:
            raise ValueError(f"{name} must be at least {value}, got {getattr(s, name)}")
    if s.warmup >= s.steps:
        raise ValueError(f"warmup must be shorter than steps ({s.steps}), got {s.warmup}")
    if not 0 <= s.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {s.dropout}")
    if s.dtype not in ("float32", "float64") or s.amp not in ("off", *AMP):
        raise ValueError(f"dtype must be float32 or float64, amp off, bf16 or fp16, got {s.dtype}, {s.amp}")
    if s.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {s.seed}")
    if s.dtype == "float64" and p.device.type == "mps":
        raise ValueError("dtype float64 can't be had on mps")
    if s.amp != "off" and s.dtype != "float32":
        raise ValueError(f"amp {s.amp} needs dtype float32, got {s.dtype}")
    if s.batch_size < p.world * s.accumulate:
        parts = f"{p.world} process(es) x accumulate {s.accumulate}"
        raise ValueError(f"batch_size {s.batch_size} is smaller than {parts}: some would have nothing to do")
    if s.data_parallel and p.world > 1:
        raise ValueError(f"data_parallel is one process, but {p.world} were started")
    if s.data_parallel and s.amp != "off":
        raise ValueError(f"data_parallel has no amp (its threads don't inherit the dtype), got {s.amp}")


def earlier_run(s: Settings, settings: dict) -> dict:
    """The state of the run in OUT, or a new one; for rank 0. ValueError if it isn't the run asked for."""
    out = Path(s.out)
    run = load_checkpoint(out)
    if run is None:
        return {"settings": settings, "step": 0, "seconds": 0.0, "tokens": 0, "loss": [], "dev": []}
    if (there := run.get("settings", {})) != settings:  # another program's state may have none
        wrong = differences(there, settings)
        raise ValueError(f"{out} holds a run of other settings ({wrong}); give another --out, or delete it")
    return run


def finished_report(out: Path) -> dict | None:
    """What finish wrote; None where some of it is missing or damaged."""
    try:
        return json.loads((out / "report.json").read_text()) if (out / "final.pt").exists() else None
    except (FileNotFoundError, ValueError):
        return None


def check_place(out: Path) -> None:
    """OSError if nothing can be written in out: known before the work."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def flops_per_token(model: GPT) -> float:
    """Forward and backward: 6 a weight, and attention over half of max_len tokens, as it is causal."""
    weights = sum(p.numel() for p in model.parameters()) - model.position.weight.numel()
    return 6 * (weights + len(model.blocks) * model.position.weight.numel())


def finish(model: GPT, run: dict, machine: dict, s: Settings) -> dict:
    """Rank 0, after the last step: final.pt, picture, report (last: with it the run is finished)."""
    weights, buffer = {name: value.cpu() for name, value in model.state_dict().items()}, io.BytesIO()
    torch.save(weights, buffer)
    write_atomically(Path(s.out, "final.pt"), buffer.getvalue())
    sample = generate(model, "The ", 400, next(model.parameters()).device, seconds=s.timeout / 4)
    print(f"--- a sample, temperature 0.6:\n{sample}\n---")
    rate = run["tokens"] / run["seconds"]
    report = {"loss": run["loss"][-1], "dev_loss": run["dev"][-1][1], "sample": sample} | machine
    report |= {"train_seconds": round(run["seconds"], 1), "tokens_per_second": round(rate)}
    report["mfu"] = round(rate * flops_per_token(model) / (machine["gemm_gflops"] * 1e9), 3)
    report["picture"] = plot_loss(run, Path(s.out, "loss.png"))
    report |= {"losses": run["loss"], "dev_losses": run["dev"], "settings": run["settings"]}
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    return report


def plot_loss(run: dict, path: Path) -> str:
    """Loss of every step's batch and of the held-out topics, as a PNG; returns its path."""
    from matplotlib.figure import Figure

    fig, png = Figure(figsize=(6, 3.6), layout="constrained"), io.BytesIO()
    axes = fig.subplots()
    axes.plot(range(1, len(run["loss"]) + 1), run["loss"], linewidth=0.8, label="training, each step's batch")
    axes.plot(*zip(*run["dev"], strict=True), "o-", label="held-out topics")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="A byte-level GPT on Python's manual")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())
    return str(path)


def hardware(p: Processes) -> dict:
    """gemm_gflops: of all processes' devices together, measured by all at once (fp32 1024^3, median of 7)."""
    a, times = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(p.device), []
    for _ in range(7):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    gflops = sum_over_ranks([2 * 1024**3 / sorted(times)[3] / 1e9], p)[0]
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # Linux, where platform knows the architecture alone
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    machine = {"processes": p.world, "device": p.device.type, "cpu": cpu, "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return machine | {"gemm_gflops": round(gflops, 1)} | versions


def run_job(s: Settings, p: Processes) -> None:
    """All of it on this rank: settings agreed, resumed or begun, trained, written."""
    text, dev = load_manual(max(1, s.max_len))
    settings = bound(s, text)
    check_settings(s, p, settings)
    run = on_rank_0(lambda: earlier_run(s, settings), p)
    finished = on_rank_0(lambda: run["step"] == s.steps and finished_report(Path(s.out)), p)
    if finished:
        if p.rank == 0:
            print(f"this run is finished; another one needs another --out than {s.out}")
            print(json.dumps(finished))
        return
    on_rank_0(partial(check_place, Path(s.out)), p)
    machine = hardware(p)
    torch.manual_seed(s.seed)
    model = GPT(s.d_model, s.n_heads, s.n_layers, s.max_len, s.dropout).to(getattr(torch, s.dtype))
    if run["step"]:
        model.load_state_dict(run.pop("model"))  # pop: no second copy all run long
    model.to(p.device)
    if p.rank == 0:
        print(" ".join(f"{name}={value}" for name, value in (asdict(s) | machine).items()))
        n_parameters, n_train = sum(weight.numel() for weight in model.parameters()), text.lengths.sum()
        print(f"{n_parameters:,} parameters; {n_train:,} bytes to learn from, {dev.lengths.sum():,} held out")
        if run["step"]:
            print(f"going on at step {run['step']}")
        sys.stdout.flush()
    train(model, (text, dev), run, s, p)
    report = on_rank_0(lambda: finish(model, run, machine, s), p)
    if p.rank == 0:
        print(json.dumps(report))


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for f in fields(Settings):
        flag, reason = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(flag, default=f.default, help=reason, **kind)
    s = Settings(**vars(parser.parse_args(argv)))
    if not 0 < s.timeout < 1e9:
        raise ValueError(f"timeout must be above 0 and below 1e9 (seconds), got {s.timeout}")
    return s


def main() -> int:
    """Exit code: 0 done, 1 another process is gone, 2 wrong input, 128 + n ended by signal n."""
    processes, alone = None, False
    try:
        s = settings_from_command_line()
        processes = start_processes(s.device, s.timeout)
        run_job(s, processes)
        return 0
    except (ValueError, OSError, ImportError) as error:
        code, message = 2, str(error)
        if isinstance(error, ImportError):
            message = f"the package {error.name} is missing: pip install {error.name}"
        alone = not isinstance(error, ValueError) and not hasattr(error, "of_all")
    except Interrupted as error:
        code, message = 128 + error.number, f"interrupted: {error}; the same command goes on from there"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on from what is saved so far"
    except Lost as error:
        code, message = 1, str(error)
    # What is wrong on all that have met, rank 0 says.
    if code == 1 or alone or processes is None or processes.rank == 0:
        print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())
