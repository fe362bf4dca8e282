"""Sharded training (FSDP2): each process keeps 1/N of weights, gradients and optimizer state; same numbers.

The byte-level GPT of train_ddp.py on Python's own manual (PSF License), as if it were too large for a device.
101 million parameters, peak RSS of a rank of 4 (torch 2.13.0, CPU): 2512 MiB with DDP, 1302 with this.

    python train_fsdp.py                                     # one process, the same code
    torchrun --nproc_per_node=8 train_fsdp.py                # FSDP: gloo on CPU, nccl on GPU
    torchrun --nproc_per_node=8 train_fsdp.py --replicate 2  # HSDP: two replicas of four slices each
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_fsdp.py

The same command goes on where it stopped, on any number of processes. Several machines need an --out that
all of them see, and with --max-restarts TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (see start_processes).

Copy what is above "The data" (shards, processes, checkpoints: they need torch alone) and the loop in train.

Which one? Training with AdamW in float32 takes 16 bytes a weight, activations aside.
- DDP where that fits on one device: least traffic (twice the weights a step), least to know.
- FSDP2 where it doesn't: 16/N bytes a weight, and a block in one piece. Three times the weights a step.
- HSDP on several machines: slices within one, where links are fast; gradients alone travel between them.
- CPU offload where 16/N is still too much: fully_shard(..., offload_policy=CPUOffloadPolicy()) keeps slices
  and AdamW in the host's memory, and every step waits for the bus. It needs an accelerator to offload from.

What FSDP1 code becomes: FSDP(model, auto_wrap_policy=...) is a loop of fully_shard; no_sync() is
set_requires_gradient_sync; model.clip_grad_norm_ is nn.utils.clip_grad_norm_; MixedPrecision is
MixedPrecisionPolicy; SHARD_GRAD_OP is reshard_after_forward=False; HYBRID_SHARD is a 2-D mesh; param_init_fn
and sync_module_states are the meta device and initialise; ShardedGradScaler is GradScaler; state_dict_type is
gone: state_dict() holds DTensors. Parameters keep names and shapes, so groups by name or ndim work.

Zhao et al. 2023, arXiv:2304.11277 (FSDP). Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO).
"""

import argparse
import gc
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

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
    n_layers: int = setting(3, "blocks; each is a unit that is gathered and dropped as one")
    dropout: float = setting(0.0, "share of features dropped; 0: the data is seen a few times only")
    lr: float = setting(4e-3, "peak learning rate of AdamW")
    warmup: int = setting(50, "steps up to the peak, then a cosine down to 0")
    weight_decay: float = setting(0.1, "on matrices; norms and biases have no reason to be small")
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: none")
    dtype: str = setting("float32", "of the weights: float32 or float64 (to compare runs exactly)")
    amp: str = setting("off", "off, bf16 (pays where the hardware has it) or fp16 (older GPUs; scaled loss)")
    replicate: int = setting(1, "HSDP: so many replicas, each sharded over processes / replicate")
    recompute: bool = setting(False, "activation checkpointing: blocks run twice, only their inputs are kept")
    exact: bool = setting(False, "2 processes bitwise as 1 with accumulate 2: slower clipping and AdamW")
    eval_every: int = setting(100, "steps between two looks at the held-out text")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end")
    keep: int = setting(3, "checkpoints kept; older ones are deleted")
    timeout: float = setting(120.0, "seconds that any wait for another process may take")
    device: str = setting("auto", "auto (cuda, then cpu), cuda or cpu")
    out: str = setting("out/train_fsdp", "checkpoints, final weights, picture and report.json go here")
    seed: int = setting(0, "same seed, same weights; without dropout on any number of processes")


# may change in a run:
FREE = ("replicate", "recompute", "eval_every", "save_every", "keep", "timeout", "device", "out")

# -----------------------------------------------------------------------------
# The model: train_ddp.py's GPT, but for who fills the weights


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
        self.max_len, self.recompute = max_len, False
        self.embedding, self.position = nn.Embedding(256, d_model), nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"tokens must be (B, T <= {self.max_len}), got {list(tokens.shape)}")
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:  # recompute: in backward, from its input, instead of keeping what is within
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V), tied to the embedding


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Fill the weights, sharded or whole, as GPT-2: a value depends on seed and its parameter's name alone.

    Each rank draws a whole parameter, on CPU, keeps its slice and goes on to the next. The usual way,
    reset_parameters on the slices, fills every rank's slice with the same values where all have one seed;
    with a seed each, another number of ranks gives other weights.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # what is added to the residual stream 2 n_layers times starts smaller
            deep = name.endswith(("out.weight", "mlp.2.weight"))
            number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
            full = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            full *= 0.02 / math.sqrt(2 * len(model.blocks)) if deep else 0.02
        else:
            full = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0)
        full = full.to(weight.device, weight.dtype)
        if isinstance(weight, DTensor):  # src_data_rank=None: slice here, send nothing
            full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(full)


# -----------------------------------------------------------------------------
# Sharding

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_mesh(replicate: int, p: "Processes", timeout: float) -> DeviceMesh:
    """All ranks in a row, (shard,); or (replicate, shard), where neighbouring ranks share a replica."""
    if replicate == 1:
        return init_device_mesh(p.device.type, (p.world,), mesh_dim_names=("shard",))
    ranks = torch.arange(p.world).view(replicate, -1)  # init_device_mesh's groups would wait for 30 minutes
    limit = timedelta(seconds=timeout)
    groups = [dist.new_subgroups_by_enumeration(r.tolist(), timeout=limit)[0] for r in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, p.device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard(model: GPT, mesh: DeviceMesh, amp: str = "off") -> None:
    """Each rank of mesh (or of its dimension "shard") keeps a slice of every parameter, cut in dimension 0.

    A block is a unit: its weights are gathered before its forward and dropped after it, gathered again for
    its backward, after which its gradients are averaged over the ranks and each rank keeps its slice. So a
    rank holds 1/N of all, and one block whole. fully_shard on the model alone would gather all at once.

    reshard_after_forward=True (the default for blocks) is that, ZeRO-3. False keeps the weights from forward
    to backward: more memory, one gathering less (ZeRO-2; the default for the root, whose backward comes
    first). A number drops all but a larger slice, gathered again within groups of so many: a machine, say.

    Prefetch: on a GPU the next block is gathered on a stream of its own while this one computes: in backward
    always, in forward as long as the CPU is ahead of the GPU; where it isn't,
    set_modules_to_forward_prefetch asks for it. With gloo nothing overlaps.

    amp: gather and compute in bf16 or fp16 (norms too: unlike autocast, a policy goes by module); slices,
    averages of gradients and AdamW stay in float32. torch.compile: block.compile() before fully_shard(block);
    it sums in another order, so 2 processes are no longer bitwise 1.
    """
    policy = MixedPrecisionPolicy(None if amp == "off" else AMP[amp], None if amp == "off" else torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks (each has to come here); other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, largest: float, exact: bool = False) -> None:
    """Scale all gradients so that the norm of them together is at most largest.

    torch's clip_grad_norm_ takes DTensors: a norm of slices' norms, one number sent. Its last digits depend
    on the number of slices. exact: norms of whole gradients, gathered one by one, as one process sees them.
    """
    if not exact:
        nn.utils.clip_grad_norm_(model.parameters(), largest)
        return
    norms = [torch.linalg.vector_norm(whole(weight.grad)) for weight in model.parameters()]
    scale = (largest / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)  # ()
    for weight in model.parameters():
        local(weight.grad).mul_(scale)


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """AdamW on the slices. Fused, it rounds otherwise at a slice's end than within: not with --exact."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=not s.exact)


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What this rank keeps between steps, counted from the tensors."""
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    kinds = {"weights": list(model.parameters()), "gradients": gradients, "moments": moments}
    return {kind: sum(local(t).nbytes for t in tensors) for kind, tensors in kinds.items()}


# -----------------------------------------------------------------------------
# Processes: start, agree, leave (as in train_ddp.py; here a single one has a group too)


class Lost(Exception):
    """Another process is gone, or did not come in time."""


@dataclass
class Processes:
    """This process among all: rank of world, and its device."""

    rank: int
    world: int
    device: torch.device


def start_processes(device: str = "auto", timeout: float = 120.0) -> Processes:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE, ...), or be a group of one.

    timeout: seconds that any wait for another process may take, here and later. Raises ValueError for a
    device that isn't there, Lost if not all processes arrive.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be auto, cuda or cpu, got {device}")
    if device == "cuda":
        if local_rank >= (have := torch.cuda.device_count()):
            raise ValueError(f"device cuda: process {local_rank} of this machine needs a GPU, it has {have}")
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    processes = Processes(rank, world, torch.device(device))
    backend, limit = "nccl" if processes.device.type == "cuda" else "gloo", timedelta(seconds=timeout)
    if world == 1:
        store = dist.HashStore()  # needs no port
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        return processes
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world}, but MASTER_ADDR isn't set: start with torchrun")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
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
def waiting(what: str, p: Processes, timeout: float | None = None):
    """Around what needs the other processes: says what was waited for if they don't answer."""
    try:
        yield
    except RuntimeError as error:  # gloo, nccl and the store raise subclasses of it
        if p.world == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        limit = f" for up to {timeout:g} s" if timeout else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Lost(f"rank {p.rank} waited{limit} for {what}; in vain: {reason}") from error


def on_rank_0(action, p: Processes):
    """What action() returns on rank 0, on every rank; and its ValueError, OSError or ImportError likewise, so
    that either all go on or all stop. For what is done once for all: reading and writing files."""
    answer = [(None, None)]
    if p.rank == 0:
        try:
            answer = [(action(), None)]
        except (ValueError, OSError, ImportError) as error:
            answer = [(None, error)]
    with waiting("rank 0's files", p):
        dist.broadcast_object_list(answer)
    result, error = answer[0]
    if error is not None:
        error.of_all = True  # rank 0 alone has to say it
        raise error
    return result


def from_all(value, p: Processes) -> list:
    """Each rank's value, in the order of ranks, on every rank."""
    values = [None] * p.world
    with waiting("a word from every rank", p):
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: list[float], p: Processes) -> list[float]:
    """Each value summed over all processes, in float64. Every rank has to come here."""
    total = torch.tensor(values, dtype=torch.float64, device=p.device)
    with waiting("a sum over all ranks", p):
        dist.all_reduce(total)
        return total.tolist()  # on a GPU this is what waits


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
# Checkpoints: each rank writes its slices, any number of ranks reads them; whole, checked, or not there


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that a step changes, by name: the weights, and AdamW's moments and step counts.

    Sharded or whole, the names are the same: what a sharded model saved, a plain one loads. AdamW makes its
    moments in its first step; before that they are made here, so that there is something to load into.
    """
    for group in optimizer.param_groups if not optimizer.state else ():
        for weight in group["params"]:
            step = torch.zeros((), device=weight.device if group["fused"] else "cpu")
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            optimizer.state[weight] = {"step": step} | moments
    names = {weight: name for name, weight in model.named_parameters()}
    tensors = {f"model.{name}": weight.detach() for weight, name in names.items()}
    for weight, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[weight]}.{key}": value for key, value in state.items()}
    return tensors


def save_checkpoint(folder: Path, step: int, tensors: dict, run: dict, p: Processes, keep: int = 3) -> Path:
    """Write FOLDER/step_00000050.SHA256; then all but the newest keep are deleted. Every rank comes here.

    Each rank writes its slices below step_00000050.part; rank 0 adds manifest.json, which holds run and the
    sha256 of every file, and renames the folder after the manifest's sha256. Killed at any moment, it's there
    whole or not at all. OSError on a full disk; the older ones stay. dcp.async_save instead copies the slices
    to the CPU and writes them while training goes on; hashing and renaming then wait for its future.
    """
    part = folder / f"step_{step:08}.part"
    on_rank_0(partial(clear_parts, folder), p)
    with shards_travel(part, p):
        dcp.save(tensors, checkpoint_id=part)  # fsyncs each file
    mine = list(part.glob(f"__{p.rank}_*")) + ([part / ".metadata"] if p.rank == 0 else [])
    hashes = from_all({path.name: sha256_of(path) for path in mine}, p)
    files = {name: digest for of_rank in hashes for name, digest in of_rank.items()}
    return on_rank_0(partial(publish, part, json.dumps(run | {"files": files}).encode(), keep), p)


def clear_parts(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for left in folder.glob("step_*.part"):  # of a save that was killed
        shutil.rmtree(left)


def publish(part: Path, manifest: bytes, keep: int) -> Path:
    """Give a complete checkpoint its name, with the manifest's sha256; delete all but the newest keep.
    OSError where a rank's files aren't here: another machine's disk isn't this one."""
    missing = [name for name in json.loads(manifest)["files"] if not (part / name).is_file()]
    if missing:
        raise OSError(f"{part} lacks {missing}: all machines must see the same --out")
    write_atomically(part / "manifest.json", manifest)
    path = part.with_suffix("." + hashlib.sha256(manifest).hexdigest())
    part.rename(path)
    for old in finished_checkpoints(path.parent)[:-keep]:
        shutil.rmtree(old.rename(old.with_suffix(".part")))  # never half of one under its name
    return path


def finished_checkpoints(folder: Path) -> list[Path]:
    """Those with a final name, oldest first."""
    return [path for path in sorted(folder.glob("step_*")) if len(path.suffix) == 65]  # a dot and a sha256


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_checkpoint(folder: Path, p: Processes) -> tuple[Path | None, dict]:
    """The newest undamaged checkpoint and its manifest; (None, {}) if there is none. Every rank comes here.

    torch.load and dcp.load take altered bytes without a word, so every file is hashed before any is loaded;
    the ranks share that. Damaged ones are reported and renamed to .damaged, so that the next newest is taken.
    """
    while True:
        path, manifest = on_rank_0(partial(newest_manifest, folder), p)
        if path is None:
            return None, {}
        names = sorted(manifest.get("files", {}))[p.rank :: p.world]
        wrong = [n for n in names if not (path / n).is_file() or sha256_of(path / n) != manifest["files"][n]]
        wrong = sum(from_all(wrong, p), []) if manifest else ["manifest.json"]
        if not wrong:
            return path, manifest
        on_rank_0(partial(set_aside, path, wrong), p)


def newest_manifest(folder: Path) -> tuple[Path | None, dict]:
    """manifest {}: not there, or not the one that the folder is named after."""
    for path in reversed(finished_checkpoints(folder)):
        file = path / "manifest.json"
        data = file.read_bytes() if file.is_file() else b""
        return path, json.loads(data) if hashlib.sha256(data).hexdigest() == path.suffix[1:] else {}
    return None, {}


def set_aside(path: Path, wrong: list[str]) -> None:
    """Rename a damaged checkpoint, so that it is never taken, and say so."""
    what = f"{', '.join(wrong)} missing or altered"
    print(f"{path} is damaged ({what}); taking the one before", file=sys.stderr, flush=True)
    path.rename(path.with_name(path.name + ".damaged"))


def load_tensors(path: Path, tensors: dict[str, Tensor], p: Processes | None = None) -> None:
    """Read a checkpoint into these tensors, in place: each rank the slices that it has of them.

    Any number of ranks may do so together; p = None: one process without torch.distributed and with a plain
    model. Checks no sums: newest_checkpoint does. Runs no code from a file.
    """
    with shards_travel(path, p):
        dcp.load(tensors, storage_reader=PlainReader(path), no_dist=p is None)


class PlainReader(dcp.FileSystemReader):
    """dcp's own unpickles .metadata, which runs whatever code it names; this one takes plain data alone."""

    def read_metadata(self, *args, **kwargs) -> dcp.Metadata:
        metadata = MetadataUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that dcp writes for tensors; for other objects dcp.load would unpickle more."""

    CLASSES = (
        "metadata.Metadata metadata.MetadataIndex metadata.TensorStorageMetadata metadata.TensorProperties "
        "metadata.ChunkStorageMetadata metadata.StorageMeta metadata._MEM_FORMAT_ENCODING "
        "filesystem._StorageInfo torch.Size torch.serialization._get_layout pathlib.PosixPath"
    ).split()

    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        short = module.removeprefix("torch.distributed.checkpoint.").replace("pathlib._local", "pathlib")
        if dtype or f"{short}.{name}" in self.CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which has no place there")


@contextmanager
def shards_travel(path: Path, p: Processes | None):
    """Around dcp's functions: what failed on any rank is an OSError on all (dcp's own CheckpointException is
    no Exception, and shows a traceback of every rank)."""
    try:
        with waiting(f"every rank's part of {path}", p or Processes(0, 1, torch.device("cpu"))):
            yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise OSError(f"{path}: rank {rank}: {str(cause) or type(cause).__name__}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# -----------------------------------------------------------------------------
# The data: who trains on what is a function of (seed, step), the same on every process (as in train_ddp.py)


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
# Training


def learning_rate(step: int, s: Settings) -> float:
    """At step 0 .. steps - 1: linear warm-up, then half a cosine to 0."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))


def train(model: GPT, optimizer, data: tuple, run: dict, s: Settings, p: Processes) -> None:
    """From step run["step"] to the last, with checkpoints; raises Interrupted after Ctrl-C or SIGTERM.

    data: two Sequences, to learn from and held out. run: what a manifest holds; it grows with each step.
    All randomness of a step (batch, dropout) is a function of seed and step, and so is the learning rate:
    a checkpoint that knows the step needs no generator's, sampler's or scheduler's state to go on exactly.
    """
    from tqdm import tqdm

    (text, dev), parts, signals = data, p.world * s.accumulate, Signals(p)
    scaler = torch.amp.GradScaler(p.device.type, enabled=s.amp == "fp16")  # fp16 loses small gradients
    if run["step"]:
        scaler.load_state_dict(run["scaler"])
    bar = tqdm(initial=run["step"], total=s.steps, unit="step", disable=None if p.rank == 0 else True)
    for step in range(run["step"], s.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        rows = rows_of_step(step, len(text.lengths), s.batch_size, s.seed)  # (batch_size,)
        n_tokens = text.lengths[rows].sum().item()  # of all ranks and micro-batches
        loss_sum = torch.zeros((), device=p.device)
        with waiting(f"every rank's part of step {step}", p):
            for micro in range(s.accumulate):
                part = micro * p.world + p.rank  # 0 .. parts - 1
                x, y = text.batch(rows[part::parts], p.device)  # (B, T) each
                torch.manual_seed((s.seed * 1_000_003 + step) * 4_096 + part)  # dropout
                # Averaged over ranks with a step's last micro-batch alone: the sum till then is of whole
                # gradients (memory!). Without this line each is averaged and kept in slices (traffic!).
                model.set_requires_gradient_sync(micro == s.accumulate - 1)
                logits = model(x).to(getattr(torch, s.dtype))  # (B, T, V)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")  # ()
                # The mean of the step's tokens, wherever they are; world undoes the averaging over ranks.
                scaler.scale(loss * (p.world / n_tokens)).backward()
                loss_sum = loss_sum + loss.detach()
            scaler.unscale_(optimizer)  # before clipping, or it would clip scaled gradients
            if s.clip:
                clip_gradients(model, s.clip, s.exact)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            scaler.step(optimizer)
            scaler.update()
        # Signals reach the ranks at different steps; the sum that each step makes anyway tells all at once.
        mean_loss, ints, terms = sum_over_ranks([loss_sum.item() / n_tokens, *signals.received()], p)
        check_finite(mean_loss, step)
        run["step"], run["tokens"] = step + 1, run["tokens"] + n_tokens
        run["seconds"] += time.perf_counter() - start
        run["loss"].append(mean_loss)
        bar.update()
        last, stopped = run["step"] == s.steps, ints + terms > 0
        if last:
            run["held"] = from_all(bytes_held(model, optimizer) | {"peak_rss": peak_rss()}, p)
        if last or run["step"] % s.eval_every == 0:
            run["dev"].append([run["step"], check_finite(evaluate(model, dev, p), step)])
            say_losses(run, s, bar, p)
        if last or stopped or (s.save_every and run["step"] % s.save_every == 0):
            state = run | {"scaler": scaler.state_dict(), "torch": torch.__version__}
            tensors = state_tensors(model, optimizer)
            path = save_checkpoint(Path(s.out), run["step"], tensors, state, p, s.keep)
        if stopped and not last:
            raise Interrupted(signal.SIGTERM if terms else signal.SIGINT, f"step {run['step']} is in {path}")
    bar.close()
    signals.restore()


def peak_rss() -> int:
    """The most bytes of memory that this process has had at once (not a GPU's)."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


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
    """Mean loss of all tokens of text, nats: each row on one rank, once."""
    model.eval()
    loss_sum = 0.0
    for chunk in torch.arange(len(text.lengths)).split(64 * p.world):
        rows = chunk[p.rank :: p.world]
        x, y = text.batch(rows if len(rows) else chunk[:1], p.device)  # (B, T) each
        with waiting("every rank's part of an evaluation", p):
            logits = model(x)  # (B, T, V); every rank must be here each time, its weights are in slices
        loss = F.cross_entropy(logits.double().flatten(0, 1), y.flatten(), reduction="sum")
        loss_sum += loss.item() if len(rows) else 0.0
    model.reshard()  # the root waits for a backward that doesn't come
    model.train()
    return sum_over_ranks([loss_sum], p)[0] / text.lengths.sum().item()


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
    """What must be the same in all parts of a run."""
    settings = {name: value for name, value in asdict(s).items() if name not in FREE}
    return settings | {"text": hashlib.sha256(text.tokens.numpy().tobytes()).hexdigest()[:16]}


def differences(there: dict, here: dict) -> str:
    """Which settings differ, with both values, as text."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def check_settings(s: Settings, p: Processes, text_digest: str = "") -> None:
    """Raises ValueError, on every rank, for settings that can't be, or that the ranks don't share."""
    mine = {name: str(value) for name, value in asdict(s).items()}  # nan isn't nan
    of_ranks = from_all(mine | {"text": text_digest}, p)
    for rank, others in enumerate(of_ranks):
        if others != of_ranks[0]:
            wrong = differences(others, of_ranks[0])
            raise ValueError(f"rank {rank} was started with other settings than rank 0: {wrong}")
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "max_len": 2, "d_model": 1, "n_heads": 1}
    least |= {"n_layers": 1, "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0, "eval_every": 1, "seed": 0}
    for name, value in (least | {"save_every": 0, "keep": 1, "replicate": 1}).items():
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
    if s.amp != "off" and (s.exact or s.dtype != "float32"):
        raise ValueError(f"amp {s.amp} needs dtype float32 and no --exact, got {s.dtype}, exact={s.exact}")
    if p.world % s.replicate:
        raise ValueError(f"replicate {s.replicate} doesn't divide the {p.world} process(es): no mesh fits")
    if s.batch_size < p.world * s.accumulate:
        parts = f"{p.world} process(es) x accumulate {s.accumulate}"
        raise ValueError(f"batch_size {s.batch_size} is smaller than {parts}: some would have nothing to do")


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


def flops_per_token(s: Settings, n_parameters: int) -> float:
    """Forward and backward: 6 a weight, and attention over half of max_len tokens, as it is causal."""
    return 6 * (n_parameters - s.max_len * s.d_model + s.n_layers * s.max_len * s.d_model)


def whole_weights(model: nn.Module, p: Processes) -> dict[str, Tensor]:
    """The plain model's state dict, on rank 0's CPU; {} on the others. One tensor is gathered at a time."""
    weights = {}
    with waiting("every rank's part of the final weights", p):
        for name, value in model.state_dict().items():
            value = whole(value)
            if p.rank == 0:
                weights[name] = value.cpu()
    return weights


def finish(weights: dict[str, Tensor], run: dict, machine: dict, s: Settings) -> dict:
    """Rank 0, after the last step: final weights, picture, report (last: with it the run is finished)."""
    import safetensors.torch

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_atomically(Path(s.out, "final.pt"), buffer.getvalue())
    write_atomically(Path(s.out, "final.safetensors"), safetensors.torch.save(weights, {"format": "pt"}))
    n_parameters = sum(weight.numel() for weight in weights.values())
    rate, size = run["tokens"] / run["seconds"], sum(weight.nbytes for weight in weights.values())
    report = {"loss": run["loss"][-1], "dev_loss": run["dev"][-1][1], "n_parameters": n_parameters}
    report |= {"train_seconds": round(run["seconds"], 1), "tokens_per_second": round(rate)} | machine
    report["mfu"] = round(rate * flops_per_token(s, n_parameters) / (machine["gemm_gflops"] * 1e9), 3)
    report["held"] = {"whole": {"weights": size, "gradients": size, "moments": 2 * size}}  # bytes
    report["held"] |= {f"rank {rank}": held for rank, held in enumerate(run["held"])}
    report["picture"] = show_memory(report["held"], Path(s.out, "memory.png"))
    report |= {"losses": run["loss"], "dev_losses": run["dev"], "settings": run["settings"]}
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    return report


def show_memory(held: dict[str, dict[str, int]], path: Path) -> str:
    """A table and a picture of what the whole takes, and what each rank held of it."""
    from matplotlib.figure import Figure

    fig, png = Figure(figsize=(6, 3.6), layout="constrained"), io.BytesIO()
    axes = fig.subplots()
    print(f"{'held, MiB':9}{'weights':>12}{'gradients':>12}{'moments':>12}{'sum':>12}{'peak RSS':>12}")
    for who, row in held.items():
        mib = [row[kind] / 2**20 for kind in ("weights", "gradients", "moments")]
        peak = f"{row['peak_rss'] / 2**20:12,.0f}" if "peak_rss" in row else ""
        print(f"{who:9}" + "".join(f"{size:12,.3f}" for size in (*mib, sum(mib))) + peak)
        for i, kind in enumerate(("weights", "gradients", "AdamW's moments")):
            label = kind if who == "whole" else None
            axes.bar(who, mib[i], 0.6, sum(mib[:i]), color=f"C{i}", label=label)
    axes.set(ylabel="held between steps (MiB)", title="Slices of weights, gradients and moments")
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


def sharded_model(s: Settings, p: Processes) -> GPT:
    """On the meta device it has shapes and no memory; then each rank makes room for its slices alone."""
    with torch.device("meta"):
        model = GPT(s.d_model, s.n_heads, s.n_layers, s.max_len, s.dropout).to(getattr(torch, s.dtype))
    with waiting("the groups of the mesh", p):
        shard(model, make_mesh(s.replicate, p, s.timeout), s.amp)
    model.to_empty(device=p.device)
    initialise(model, s.seed)
    model.recompute = s.recompute
    return model


def run_job(s: Settings, p: Processes) -> None:
    """All of it on this rank: settings agreed, resumed or begun, trained, written."""
    text, dev = load_manual(max(1, s.max_len))
    settings = bound(s, text)
    check_settings(s, p, settings["text"])
    path, run = newest_checkpoint(Path(s.out), p)
    run = run or {"settings": settings, "step": 0, "seconds": 0.0, "tokens": 0, "loss": [], "dev": []}
    if (there := run.get("settings", {})) != settings:  # another program's checkpoint may have none
        wrong = differences(there, settings)
        raise ValueError(f"{s.out} holds a run of other settings ({wrong}); give another --out, or delete it")
    finished = on_rank_0(lambda: run["step"] == s.steps and finished_report(Path(s.out)), p)
    if finished:
        if p.rank == 0:
            print(f"this run is finished; another one needs another --out than {s.out}")
            print(json.dumps(finished))
        return
    on_rank_0(partial(check_place, Path(s.out)), p)
    machine = hardware(p)
    model = sharded_model(s, p)
    optimizer = make_optimizer(model, s)
    if path:
        load_tensors(path, state_tensors(model, optimizer), p)
    if p.rank == 0:
        print(" ".join(f"{name}={value}" for name, value in (asdict(s) | machine).items()))
        n_parameters, n_train = sum(weight.numel() for weight in model.parameters()), text.lengths.sum()
        print(f"{n_parameters:,} parameters; {n_train:,} bytes to learn from, {dev.lengths.sum():,} held out")
        if path:
            print(f"going on at step {run['step']}")
        sys.stdout.flush()
    train(model, optimizer, (text, dev), run, s, p)
    weights = whole_weights(model, p)
    report = on_rank_0(partial(finish, weights, run, machine, s), p)
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
