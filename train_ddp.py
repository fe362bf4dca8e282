"""Data-parallel training that gives the same weights on any number of processes, and survives being killed.

A byte-level GPT learns Python's own manual, 465,000 bytes that every Python has (PSF License): 33 s on two
cores of an AMD EPYC (torch 2.13.0). Two processes make 1.84 times the tokens a second of one (batch
64). On the CPU, 40 kill -9 at random moments left the final weights bit for bit those of undisturbed runs.

    python train_ddp.py                        # one process; --data-parallel: nn.DataParallel, see wrap
    torchrun --nproc_per_node=8 train_ddp.py   # DDP: gloo on CPU, nccl on GPU (which nobody has run yet)
    torchrun --nproc_per_node=8 train_ddp.py --amp bf16 --compile --batch-size 256 --max-len 1024 \\
        --d-model 1024 --n-heads 16 --n-layers 12 --lr 6e-4                          # keeps 8 GPUs busy

The same command goes on where it stopped. When a process is lost, gloo (CPU) raises an error in the others:
they say so and exit with code 1. NCCL (GPU) raises nothing: after --timeout its watchdog thread aborts the
process, which torchrun reports as SIGABRT. Several machines, nodes that come and go, Slurm: README.

DDP: Li et al. 2020, arXiv:2006.15704. GPT: Radford et al. 2019.
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# -----------------------------------------------------------------------------
# Processes: start, agree, leave


class Stop(Exception):
    """Ends this process; main prints its sentence. shared: every rank raises it, rank 0 prints."""

    def __init__(self, sentence: str, code: int = 1, shared: bool = False):
        super().__init__(sentence)
        self.code = code
        self.shared = shared


@dataclass
class Processes:
    """This process among all: rank of world, and its device. A world of one has no process group."""

    rank: int
    world: int
    device: torch.device
    files: dist.ProcessGroup | None = None  # gloo, 2 h: for waits on rank 0's files
    parent: int = 0  # id of the torchrun that started this process; 0: none


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def start_processes(device: str = "auto", timeout: float = 120.0) -> Processes:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE, ...), or be the only one.
    timeout: seconds that a wait for another process may take, here and in every step.
    ValueError for a GPU that isn't there, a DistError if not all processes arrive."""
    env = os.environ
    p = Processes(0, 1, pick_device(device))
    local_rank = 0
    if "RANK" in env or "WORLD_SIZE" in env:  # a KeyError here: start with torchrun
        p.rank, p.world, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    p.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in env else 0
    backend = "gloo"
    if p.device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"device cuda: process {local_rank} needs a GPU of its own")
        torch.cuda.set_device(local_rank)
        p.device = torch.device("cuda", local_rank)
        torch.set_float32_matmul_precision("high")  # TF32
        backend = "cpu:gloo,cuda:nccl"  # gradients by nccl, numbers and flags from CPU to CPU
    if p.world == 1:
        return p
    one_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, for all attempts
    if one_store and env.get("GROUP_WORLD_SIZE", "1") != "1" and env["TORCHELASTIC_MAX_RESTARTS"] != "0":
        needed = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv_backend=c10d"
        raise ValueError(f"--max-restarts on several nodes needs a new store a restart: set {needed}")
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    if one_store:  # it keeps the addresses of workers that died (torch 2.13)
        store = dist.PrefixStore(env["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=p.rank, world_size=p.world, timeout=limit)
    p.files = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    return p


def on_rank_0(action, processes: Processes):
    """action()'s result on rank 0, on every rank; its ValueError or OSError is raised on every rank.
    For what is done once for all, reading and writing files: either all go on or all stop."""
    answer = [None]
    if processes.rank == 0:
        try:
            answer = [action()]
        except (ValueError, OSError) as error:
            error.shared = True  # all ranks raise it, so rank 0 alone prints it
            answer = [error]
    if processes.world > 1:
        dist.broadcast_object_list(answer, group=processes.files)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def sum_over_ranks(values: list[float], processes: Processes) -> list[float]:
    """Each value summed over all processes, in float64. Every rank has to come here."""
    if processes.world == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def share_of_mean(loss_sum: Tensor, n_total: int, world: int) -> Tensor:
    """The loss for backward(), such that DDP's mean over ranks is the gradient of the mean over tokens.
    loss_sum: () of this micro-batch's tokens; n_total: tokens of the step's whole batch, on all ranks.
    A mean of the ranks' means would be wrong where they hold unequal numbers of tokens."""
    return loss_sum * (world / n_total)


class Signals:
    """Notes Ctrl-C, SIGTERM and a closed terminal (SIGHUP): no step is left half done. A second one
    ends a lone process at once; of several none ends before all have saved (torchrun waits 30 s)."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.noted = []  # their numbers
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup does
            numbers.append(signal.SIGHUP)
        self.before = {n: signal.signal(n, self.note) for n in numbers}

    def note(self, number: int, _frame) -> None:
        self.noted.append(number)
        if self.processes.world == 1:
            signal.signal(number, signal.SIG_DFL)

    def received(self) -> bool:
        """True once one has come. Stop where torchrun is gone: orphans must not write beside a new run."""
        if self.processes.parent and os.getppid() != self.processes.parent:
            raise Stop(f"rank {self.processes.rank} has lost the torchrun that started it")
        return bool(self.noted)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def exit_now(code: int):
    """End a script. gloo's threads can abort the interpreter while it shuts down (pytorch#190489);
    after a failure, ending the group may wait for others."""
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -----------------------------------------------------------------------------
# Checkpoints: whole, checked, or not there


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, even if we are killed mid-write."""
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as folder:  # own name, same disk
        temporary = Path(folder, path.name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 3) -> Path:
    """Write FOLDER/step_00000050.SHA256.pt; then all but the newest keep are deleted. Returns its path.
    state: tensors, numbers, strings, lists, dicts alone. OSError on a full disk; the older ones stay."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step_{step:08}.{hashlib.sha256(buffer.getvalue()).hexdigest()}.pt"
    write_atomically(path, buffer.getvalue())
    for old in finished_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def finished_checkpoints(folder: Path) -> list[Path]:
    """The files of save_checkpoint, oldest first; not what other programs have called step_*.pt."""
    files = folder.glob("step_" + "[0-9]" * 8 + "." + "[0-9a-f]" * 64 + ".pt")
    return sorted(files, key=lambda path: (path.name[:13], path.stat().st_mtime_ns))  # by step, then time


def load_checkpoint(folder: Path) -> dict | None:
    """The newest undamaged state in folder, on the CPU; None if there is none. Runs no code from a file.
    Damaged files are reported and renamed to .damaged, so that the next newest is taken, now and later."""
    for path in reversed(finished_checkpoints(folder)):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        print(f"{path} is damaged (sha256 isn't that of its name); taking the one before", file=sys.stderr)
        path.rename(path.with_suffix(".damaged"))
    return None


# -----------------------------------------------------------------------------
# Training


@dataclass
class Settings:
    steps: int = 700  # optimizer steps in all
    batch_size: int = 16  # sequences a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a process takes for a step: less memory
    max_len: int = 128  # tokens (here bytes) the model looks back
    d_model: int = 128  # width
    n_heads: int = 4  # heads of attention; divides d_model
    n_layers: int = 2  # blocks
    dropout: float = 0.0  # fraction of features dropped; which ones depends on the number of processes
    lr: float = 6e-3  # peak learning rate of AdamW
    warmup: int = 50  # steps up to the peak; then a cosine down to 0
    clip: float = 1.0  # largest norm of the whole gradient; 0: none
    dtype: Literal["float32", "float64"] = "float32"  # of the weights
    amp: Literal["off", "bf16", "fp16"] = "off"  # bf16 where the hardware has it; fp16 on older GPUs
    compile: bool = False  # torch.compile: pays on a GPU, after a minute
    eval_every: int = 100  # steps between two looks at the held-out text
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    keep: int = 3  # checkpoints kept; older ones are deleted
    timeout: float = 120.0  # seconds a step may wait for another process
    data_parallel: bool = False  # nn.DataParallel in one process instead of DDP: to see, not to use
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, else cpu
    out: str = "out/train_ddp"  # checkpoints, final.pt, log.jsonl and report.json go here
    seed: int = 0  # same seed, same weights


# These may differ between two starts of a run, as may the number of processes and threads.
MAY_CHANGE = "compile eval_every save_every keep timeout data_parallel device out".split()
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def wrap(model: nn.Module, p: Processes, data_parallel: bool = False) -> nn.Module:
    """The model that forward goes through: its gradients become the mean over all processes.
    nn.DataParallel is one process with a thread a GPU: Python's lock is shared, the model is copied to
    every GPU in every step, all logits come back to the first one, and it can't leave the machine."""
    if p.world == 1:
        return nn.DataParallel(model) if data_parallel and p.device.type == "cuda" else model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def make_optimizer(model: nn.Module, s: Settings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, norms and biases don't.
    Unfused on CPU: there the fused one rounds differently at different places of a tensor."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the peak learning rate at a step (from 0): linear up to 1, then half a cosine down to 0."""
    warmup = min(warmup, total)
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def micro_batches(text: tuple[Tensor, Tensor], step: int, s: Settings, p: Processes):
    """This rank's inputs and targets (B, T) from step on, with the tokens of the step's whole batch.
    Batches are cut from an endless row of shuffles, which the seed alone decides."""
    inputs, targets = text
    epoch, done = divmod(step * s.batch_size, len(inputs))
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < s.batch_size:
            generator = torch.Generator().manual_seed(s.seed * 1_000_003 + epoch)
            rows = torch.cat((rows, torch.randperm(len(inputs), generator=generator)[done:]))
            epoch += 1
            done = 0
        whole, rows = rows.tensor_split([s.batch_size])  # (batch_size,) and the rest
        n_tokens = (targets[whole] != -100).sum().item()
        for micro in range(s.accumulate):
            mine = whole[micro * p.world + p.rank :: p.world * s.accumulate]
            batch = (inputs[mine], targets[mine])
            if p.device.type == "cuda":  # pinned: the CPU needn't wait for the copy
                batch = [t.pin_memory() for t in batch]
            yield *(t.to(p.device, non_blocking=True) for t in batch), n_tokens


def check_finite(what: str, value: float, step: int) -> None:
    """Stop where training has diverged; on all ranks, as all have the same value."""
    if not math.isfinite(value):
        raise Stop(f"the {what} is {value} at step {step}: try a smaller --lr, or --clip 1", shared=True)


def train(model, optimizer, text: tuple, dev: tuple, run: dict, s: Settings, p: Processes) -> None:
    """From step run["step"] to the last, with checkpoints. Stop after a signal. Seed and step decide batch,
    dropout and learning rate: no generator's, sampler's or scheduler's state needs saving."""
    from tqdm import tqdm

    parallel = wrap(model, p, s.data_parallel)
    autocast = torch.autocast(p.device.type, AMP[s.amp], enabled=s.amp != "off")
    scaler = torch.amp.GradScaler(p.device.type, enabled=s.amp == "fp16")  # fp16 loses small gradients
    if run["step"]:
        scaler.load_state_dict(run["scaler"])
    signals = Signals(p)
    batches = micro_batches(text, run["step"], s, p)
    x, y, n_next = next(batches)
    bar = tqdm(initial=run["step"], total=s.steps, unit="step", disable=None if p.rank == 0 else True)
    for step in range(run["step"], s.steps):
        start = time.perf_counter()
        n_tokens = n_next  # of all ranks and micro-batches
        loss_sum = torch.zeros((), device=p.device)
        for micro in range(s.accumulate):
            torch.manual_seed((s.seed * 1_000_003 + step) * 4_096 + micro * p.world + p.rank)  # dropout
            # DDP's no_sync, as forward asks for it: gradients travel with the last micro-batch alone.
            parallel.require_backward_grad_sync = micro == s.accumulate - 1
            with autocast:
                logits = parallel(x).to(getattr(torch, s.dtype))  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")  # ()
            scaler.scale(share_of_mean(loss, n_tokens, p.world)).backward()
            loss_sum = loss_sum + loss.detach()
            x, y, n_next = next(batches)  # made and sent while a GPU is still busy with backward
        scaler.unscale_(optimizer)  # before clipping, or it would clip scaled gradients
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)  # ()
        loss, norm = torch.stack((loss_sum, norm)).tolist()  # the step's one wait for a GPU
        # Signals reach the ranks at different steps; the sum that each step makes tells all at once.
        loss, stopped = sum_over_ranks([loss / n_tokens, signals.received()], p)
        check_finite("loss", loss, step)
        if not scaler.is_enabled():  # GradScaler skips a step of infinite gradients itself
            check_finite("gradient's norm", norm, step)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * warmup_cosine(step, s.warmup, s.steps)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run["step"] = step + 1
        run["tokens"] += n_tokens
        run["train_seconds"] += time.perf_counter() - start
        run["losses"].append(loss)
        bar.update()
        last = run["step"] == s.steps
        if last or run["step"] % s.eval_every == 0:
            dev_loss = evaluate(model, dev, autocast, p)
            check_finite("held-out loss", dev_loss, step)
            on_rank_0(partial(log, run, dev_loss, norm, bar, s, p), p)
        if last or stopped or (s.save_every and run["step"] % s.save_every == 0):
            state = run | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state["scaler"] = scaler.state_dict()
            path = on_rank_0(partial(save_checkpoint, Path(s.out), run["step"], state, s.keep), p)
        if stopped and not last:
            number = signals.noted[0] if signals.noted else signal.SIGTERM  # of this rank, or of another
            done = f"interrupted: step {run['step']} is in {path}; the same command goes on"
            raise Stop(done, 128 + number, shared=True)
    bar.close()
    signals.restore()


def log(run: dict, dev_loss: float, norm: float, bar, s: Settings, p: Processes) -> None:
    """Rank 0 prints a row, and writes all of this run to OUT/log.jsonl, a JSON object a line."""
    row = {"step": run["step"], "loss": run["losses"][-1], "dev_loss": dev_loss}
    row["gradient_norm"] = norm if math.isfinite(norm) else None  # JSON has no inf
    row["tokens_per_second"] = round(run["tokens"] / run["train_seconds"])
    if p.device.type == "cuda":
        row["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    run["log"].append(row)
    Path(s.out, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run["log"]))
    bar.clear()
    print("  ".join(f"{name} {x:.6g}" for name, x in row.items() if x is not None), flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, text: tuple[Tensor, Tensor], autocast, p: Processes) -> float:
    """Mean loss of all tokens of text: each row on one rank, once (DistributedSampler repeats some)."""
    model.eval()
    inputs, targets = text
    losses = []
    for rows in torch.arange(len(inputs))[p.rank :: p.world].split(64):
        with autocast:
            logits = model(inputs[rows].to(p.device)).to(model.norm.weight.dtype)  # (B, T, V)
        y = targets[rows].to(p.device).flatten()
        losses.append(F.cross_entropy(logits.flatten(0, 1), y, reduction="sum"))
    model.train()
    loss_sum = sum(loss.item() for loss in losses)  # only now, so that no forward waits for a GPU
    return sum_over_ranks([loss_sum], p)[0] / (targets != -100).sum().item()


# -----------------------------------------------------------------------------
# The demo's data and model


def load_manual(max_len: int) -> list[tuple[Tensor, Tensor]]:
    """[train, dev], each (inputs, targets) (N, T) int64: Python's manual in rows of max_len bytes.
    Every byte is a target once; -100, which cross_entropy ignores, fills up a text's last row."""
    from pydoc_data.topics import topics  # what help("topics") shows; PSF License

    parts = ([], [])
    for i, text in enumerate(sorted(set(topics.values()))):  # every tenth is held out
        data = list(b"\n" + text.encode())  # the first byte is predicted from a line's end
        for start in range(0, len(data) - 1, max_len):
            row = data[start : start + max_len + 1]  # rows overlap by one
            parts[i % 10 == 9].append(row + [-100] * (max_len + 1 - len(row)))
    rows = [torch.tensor(part) for part in parts]  # (N, T + 1)
    return [(part[:, :-1].clamp(min=0), part[:, 1:]) for part in rows]


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). x (B, T, C)."""

    def __init__(self, d_model: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = nn.Dropout(dropout)
        self.self_attention_norm = nn.LayerNorm(d_model)
        self.ffn_norm = nn.LayerNorm(d_model)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.self_attention_norm(x)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.dropout(self.out_proj(attended.transpose(1, 2).flatten(2)))  # (B, T, C)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class GPT(nn.Module):
    """tokens (B, T) of 0 .. 255, T <= max_len -> logits (B, T, 256) of the next byte."""

    def __init__(self, d_model: int, n_heads: int, n_layers: int, max_len: int, dropout: float = 0.0):
        super().__init__()
        self.max_len = max_len
        self.embedding = nn.Embedding(256, d_model)
        self.position = nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # GPT-2: what is added to the residual stream 2 n_layers times starts smaller
                deep = name.endswith(("out_proj.weight", "ffn.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layers) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V), tied to the embedding


@torch.no_grad()
def generate(model: GPT, prompt: str, n_bytes: int, device: torch.device, temperature: float = 0.6) -> str:
    """The prompt and n_bytes more, drawn from the model; below 1, temperature prefers what is likely."""
    model.eval()
    tokens = torch.tensor([list(b"\n" + prompt.encode())], device=device)  # (1, T)
    torch.manual_seed(0)
    for _ in range(n_bytes):
        # Not max_len bytes: in training nothing ever looks back at the last position; it is learnt worst.
        logits = model(tokens[:, 1 - model.max_len :])[:, -1]  # (1, V)
        tokens = torch.cat((tokens, (logits / temperature).softmax(-1).multinomial(1)), dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace").strip()


# -----------------------------------------------------------------------------
# The job: resume or start, train, write


def check_settings(s: Settings, p: Processes) -> None:
    """ValueError for settings that make no sense."""
    may_be_0 = ("dropout", "lr", "warmup", "clip", "save_every", "seed")
    for name, value in asdict(s).items():
        least = 0 if name in may_be_0 else 1
        below = 2**32 if name == "seed" else math.inf
        if type(value) in (int, float) and not least <= value < below:
            raise ValueError(f"{name} must be in [{least}, {below}), got {value}")
    if s.d_model % s.n_heads:
        raise ValueError(f"d_model must be a multiple of n_heads, got {s.d_model} and {s.n_heads}")
    if s.batch_size < p.world * s.accumulate:
        raise ValueError(f"batch_size must be at least processes x accumulate, got {s.batch_size}")
    if s.amp != "off" and (s.dtype != "float32" or s.data_parallel):  # its threads don't inherit autocast
        raise ValueError(f"amp {s.amp} needs dtype float32, got {s.dtype}, and no data_parallel")
    if s.data_parallel and (s.compile or p.world > 1):  # its copies would call the compiled original
        raise ValueError("data_parallel is one process, not compiled: leave out --compile and torchrun")


def differences(there: dict, here: dict) -> str:
    """Which settings differ, with both values, as text; "" if none does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, p: Processes) -> None:
    """Rank 0's saved state_dict() of an AdamW, on all ranks; its tensors are sent one at a time.
    They are made for this device and kind of AdamW (fused or not), whatever it was saved from."""
    weights = [(group, weight) for group in optimizer.param_groups for weight in group["params"]]
    for i, (group, weight) in enumerate(weights):
        step = torch.zeros((), device=weight.device if group["fused"] else "cpu")
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": step} | moments
        for name, tensor in optimizer.state[weight].items():
            if p.rank == 0 and saved["state"]:  # empty where fp16 has skipped every step so far
                tensor.copy_(saved["state"][i][name])
            if p.world > 1:
                dist.broadcast(tensor, src=0)


def lock_out(out: Path, patience: float = 10.0):
    """Hold out while this process lives: keep what is returned. ValueError if another run has it."""
    file = open(out / "lock", "w")
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has none: no lock
        return file
    for _ in range(round(patience * 10)):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in out.glob("tmp*.part"):  # of a process that was killed while it wrote
                shutil.rmtree(left)
            return file
        time.sleep(0.1)
    raise ValueError(f"--out {out} is in use by another run")


def open_run(out: Path, settings: dict, kept: dict) -> dict:
    """For rank 0: the state of the run in OUT, or of a new one; the report, if that run is finished.
    kept (a dict, filled here) gets OUT's lock and the checkpoint's tensors. ValueError for another run."""
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    run = None
    if (out / "final.pt").exists() and (out / "report.json").exists():
        with suppress(ValueError):  # a damaged one is made again
            run = json.loads((out / "report.json").read_text())
    if run is None:
        out.mkdir(parents=True, exist_ok=True)
        kept["lock"] = lock_out(out)
        new = {"settings": settings, "step": 0, "tokens": 0, "train_seconds": 0.0, "losses": [], "log": []}
        run = load_checkpoint(out) or new
        if list(out.glob("step_*/manifest.json")):
            raise ValueError(f"{out} holds a run of train_fsdp.py; give another --out")
    if wrong := differences(run.get("settings", {}), settings):
        raise ValueError(f"{out} holds a run of other settings ({wrong}); give another --out")
    kept.update({name: run.pop(name, None) for name in ("model", "optimizer")})
    return run


def finish(model: GPT, run: dict, s: Settings, p: Processes) -> dict:
    """For rank 0, after the last step: final.pt, a sample, then report.json: the run is finished."""
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    write_atomically(Path(s.out, "final.pt"), buffer.getvalue())
    sample = generate(model, "The ", 400, p.device)
    print(f"--- a sample, temperature 0.6:\n{sample}\n---")
    report = run | run["log"][-1] | {"finished": True, "sample": sample, "processes": p.world}
    report |= {"device": str(p.device), "cpu": torch.cpu.get_capabilities().get("cpu_name")}
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    return report


def explain(error: Exception, p: Processes | None, training: bool) -> int:
    """Print what ended this process: advice where there is some, else a traceback. Returns the exit code."""
    message = str(error)
    shared = getattr(error, "shared", False)
    wrong_input = isinstance(error, ValueError | OSError) and not training
    # Communication errors alone are told so; gloo's have no class of their own.
    gloos = isinstance(error, RuntimeError) and ("/gloo/" in message or "pair closure" in message)
    if "RANK" in os.environ and (isinstance(error, dist.DistError) or gloos):
        reason = message.strip().splitlines()[0]
        message = f"rank {os.environ['RANK']} can't reach the other processes: {reason}"
    elif not (wrong_input or shared or isinstance(error, Stop)):
        traceback.print_exception(error)
        return 1
    if p is None or p.rank == 0 or not shared:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return getattr(error, "code", 2 if wrong_input else 1)


def main(s: Settings) -> int:
    """Exit code: 0 done, 1 failed, 2 wrong input, 128 + n ended by signal n."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None: closed (2>&-)
    p = None
    training = False
    try:
        p = start_processes(s.device, s.timeout)
        on_rank_0(partial(check_settings, s, p), p)
        text, dev = load_manual(s.max_len)
        digest = hashlib.sha256(text[1].numpy().tobytes()).hexdigest()[:16]
        settings = asdict(s) | {"text": digest, "script": "train_ddp.py"}
        if wrong := differences(on_rank_0(lambda: settings, p), settings):
            raise ValueError(f"rank {p.rank} was started with other settings than rank 0: {wrong}")
        kept = {}  # rank 0's own: OUT's lock, and tensors that are sent as tensors later
        run = on_rank_0(partial(open_run, Path(s.out), settings, kept), p)
        if p.rank == 0:
            print(f"{settings} processes={p.world} device={p.device} from_step={run['step']}", flush=True)
        if not run.get("finished"):
            torch.manual_seed(s.seed)
            model = GPT(s.d_model, s.n_heads, s.n_layers, s.max_len, s.dropout).to(getattr(torch, s.dtype))
            if run["step"] and p.rank == 0:  # whose weights DDP sends to the others
                model.load_state_dict(kept.pop("model"))
            optimizer = make_optimizer(model.to(p.device), s, p.device)
            if run["step"]:
                load_optimizer(optimizer, kept.pop("optimizer", None), p)
            if s.compile:
                model.compile()
            training = True
            train(model, optimizer, text, dev, run, s, p)
            run = on_rank_0(partial(finish, model, run, s, p), p)
        elif p.rank == 0:
            print(f"this run is finished; another one needs another --out than {s.out}")
        if p.rank == 0:
            short = {name: run[name] for name in ("loss", "dev_loss", "tokens_per_second")}
            print(json.dumps(short | {"report": f"{s.out}/report.json"}))
        return 0
    except Exception as error:
        return explain(error, p, training)


if __name__ == "__main__":
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    exit_now(main(tyro.cli(Settings, description=__doc__)))
