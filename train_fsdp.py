"""Sharded training (FSDP2): each process keeps 1/N of weights, gradients and optimizer state; same numbers.

train_ddp.py's byte-level GPT on Python's manual (PSF License), as if it were too large for a device.
101 million parameters, peak RSS of a rank of 4 (torch 2.13.0, Intel Xeon): 2512 MiB with DDP, 1302 with this.

    python train_fsdp.py  # one process, the same code
    torchrun --nproc_per_node=8 train_fsdp.py  # FSDP: gloo on CPU, nccl on GPU (not run yet)
    torchrun --nproc_per_node=8 train_fsdp.py --replicate 2  # HSDP: two replicas of four slices each
    torchrun --nproc_per_node=8 train_fsdp.py --amp bf16 --compile --recompute --batch-size 64 \\
        --max-len 1024 --d-model 2048 --n-heads 16 --n-layers 24 --lr 3e-4  # keeps 8 GPUs busy

The same command goes on where it stopped, on any number of processes. Several machines need
an --out that all of them see. Lost processes and elastic runs: as in train_ddp.py.

Which one? Training with AdamW in float32 takes 16 bytes a weight, activations aside.
- DDP where that fits on one device: least traffic (twice the weights a step).
- FSDP2 where it doesn't: 16/N bytes a weight, embeddings and a block whole. Three times the weights a step.
- HSDP on several machines: slices within one, where links are fast; gradients travel between them.
- CPUOffloadPolicy where 16/N is too much: slices and AdamW live in the host's memory.

FSDP: Zhao et al. 2023, arXiv:2304.11277. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Sharding

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_mesh(replicate: int, device: torch.device, timeout: float) -> DeviceMesh:
    """All ranks in a row, (shard,); or (replicate, shard), where neighbouring ranks share a replica.
    The groups are made here, with our timeout; init_device_mesh's would wait for 30 minutes."""
    if replicate == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    ranks = torch.arange(dist.get_world_size()).view(replicate, -1)  # a row: a replica
    limit = timedelta(seconds=timeout)
    groups = [dist.new_subgroups_by_enumeration(r.tolist(), timeout=limit)[0] for r in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, amp: str = "off", compile: bool = False) -> None:
    """Each rank of mesh (or of its dimension "shard") keeps a slice of every parameter, cut in dimension 0.
    A block is a unit: its weights are gathered before its forward and dropped after it, gathered again
    for its backward; then its gradients are averaged over the ranks and each rank keeps its slice (ZeRO-3;
    reshard_after_forward=False is ZeRO-2). What is in no block (embeddings, last norm) stays whole
    until the end of backward. NCCL gathers the next block while this one computes; gloo doesn't.
    amp: gather and compute in bf16 or fp16 (norms too); slices, averages and AdamW stay in float32."""
    policy = MixedPrecisionPolicy(AMP[amp], None if amp == "off" else torch.float32)
    for block in model.blocks:
        if compile:
            block.compile()  # FSDP's hooks, which gather, never are
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill the weights, sharded or whole, as GPT-2: values depend on seed and parameter's name alone.
    Each rank draws a whole parameter, on CPU, keeps its slice and goes on. reset_parameters on slices
    on CPUs would fill all with the same values; with a seed each, other numbers of ranks would differ."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # what is added to the residual stream 2 n_layers times starts smaller
            deep = name.endswith(("out_proj.weight", "ffn.2.weight"))
            number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
            full = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            full *= 0.02 / math.sqrt(2 * len(model.blocks)) if deep else 0.02
        else:
            full = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0)
        full = full.to(weight.device, weight.dtype)
        if isinstance(weight, DTensor):  # src_data_rank=None: slice here, send nothing
            full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(full)


def clip_gradients(model: nn.Module, largest: float, exact: bool = False) -> Tensor:
    """Scale all gradients so that their norm together is at most largest. Returns the norm before, ().
    torch's clip_grad_norm_ takes the norm of slices' norms: last digits depend on their number.
    exact: norms of whole gradients, gathered one by one, as one process sees them."""
    if not exact:
        return nn.utils.clip_grad_norm_(model.parameters(), largest).full_tensor()
    norms = [torch.linalg.vector_norm(weight.grad.full_tensor()) for weight in model.parameters()]
    norm = torch.linalg.vector_norm(torch.stack(norms))  # ()
    for weight in model.parameters():
        weight.grad.to_local().mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def make_optimizer(model: nn.Module, s: "Settings") -> torch.optim.Optimizer:
    """AdamW on the slices. Fused rounds differently at a slice's end, so not with --exact."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=not s.exact)


def memory_held(model: nn.Module, optimizer: torch.optim.Optimizer, p: "Processes") -> list[dict]:
    """For each rank: bytes that it keeps between steps, counted from its tensors."""
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = [weight.grad for weight in model.parameters()]
    kinds = {"weights": list(model.parameters()), "gradients": gradients, "moments": moments}
    held = {kind: sum(t.to_local().nbytes for t in tensors) for kind, tensors in kinds.items()}
    of_ranks = [{}] * p.world
    dist.all_gather_object(of_ranks, held, group=p.files)
    return of_ranks


# -----------------------------------------------------------------------------
# Processes: start, agree, leave (as in train_ddp.py; here a single one has a group too)


class Stop(Exception):
    """Ends this process; main prints its sentence. shared: every rank raises it, rank 0 prints."""

    def __init__(self, sentence: str, code: int = 1, shared: bool = False):
        super().__init__(sentence)
        self.code = code
        self.shared = shared


@dataclass
class Processes:
    """This process among all: rank of world, and its device. A world of one has a group, too."""

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
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
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
# Checkpoints: slices of every rank, for any number of ranks; whole, checked, or not there


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, even if we are killed mid-write."""
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as folder:  # own name, same disk
        temporary = Path(folder, path.name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that a step changes, by name: the weights, and AdamW's moments and step counts.
    Sharded or whole, the names are the same: what a sharded model saved, a plain one loads. Before
    AdamW's first step its moments are made here, to be loaded into."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"model.{name}"] = weight.detach()
        state = optimizer.state[weight]
        if not state:
            fused = optimizer.defaults["fused"]
            state["step"] = torch.zeros((), device=weight.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


def save_checkpoint(folder: Path, step: int, tensors: dict, run: dict, p: Processes, keep: int = 3) -> Path:
    """Write FOLDER/step_00000050.SHA256; then all but the newest keep are deleted. Every rank comes here.
    Slices are written below step_00000050.part, to which publish gives its name: killed at any moment,
    it's there whole or not at all. OSError on a full disk; the older ones stay."""
    part = folder / f"step_{step:08}.part"
    try:
        with dcp_errors(part):
            dcp.save(tensors, checkpoint_id=part, process_group=p.files)  # fsyncs each file
    except OSError:
        on_rank_0(partial(shutil.rmtree, part, ignore_errors=True), p)  # a full disk is fuller with it
        raise
    return on_rank_0(partial(publish, part, run, keep), p)


def publish(part: Path, run: dict, keep: int) -> Path:
    """For rank 0: add manifest.json, with run and the sha256 of each file; name the folder after its own.
    OSError where a rank's files are on another machine's disk."""
    needed = {entry.relative_path for entry in PlainReader(part).read_metadata().storage_data.values()}
    files = {name: sha256_of(part / name) for name in (".metadata", *needed)}
    if "" in files.values():
        raise OSError(f"{part} lacks some of {sorted(needed)}: all machines must see the same --out")
    manifest = json.dumps(run | {"files": files}).encode()
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
    """sha256 of a file in hexadecimal; "" where there is none."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict | None]:
    """For rank 0: the newest undamaged checkpoint and its manifest; (None, None) if there is none.
    dcp.load takes altered bytes silently, so every file is hashed before any is loaded. Damaged ones
    are reported and renamed to .damaged, so that the next newest is taken."""
    for path in reversed(finished_checkpoints(folder)):
        wrong = ["manifest.json"]
        if sha256_of(path / "manifest.json") == path.suffix[1:]:
            manifest = json.loads((path / "manifest.json").read_bytes())
            wrong = [name for name, sha in manifest["files"].items() if sha256_of(path / name) != sha]
            if not wrong:
                return path, manifest
        print(f"{path} is damaged ({', '.join(wrong)} missing or altered)", file=sys.stderr, flush=True)
        path.rename(f"{path}.damaged")
    return None, None


def load_tensors(path: Path, tensors: dict[str, Tensor], p: Processes | None = None) -> None:
    """Read a checkpoint into these tensors, in place: each rank its slices, on any number of ranks.
    p = None: one process without a group, a plain model. Checks no sums; runs no code from a file."""
    with dcp_errors(path):
        reader = PlainReader(path)
        dcp.load(tensors, storage_reader=reader, process_group=p.files if p else None, no_dist=p is None)


class PlainReader(dcp.FileSystemReader):
    """dcp's own unpickles .metadata, which runs whatever code it names; this one takes plain data."""

    def read_metadata(self, *args, **kwargs) -> dcp.Metadata:
        return MetadataUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that dcp writes for tensors; for others dcp.load would unpickle more."""

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
def dcp_errors(path: Path):
    """Around dcp's functions: what failed on any rank is an OSError on all.
    dcp's own CheckpointException is no Exception, and shows a traceback of every rank."""
    try:
        yield
    except dcp.CheckpointException as failed:
        rank, (cause, _) = min(failed.failures.items(), key=lambda item: item[0])
        error = OSError(f"{path}: rank {rank}: {str(cause) or type(cause).__name__}")
        error.shared = True
        raise error from failed


# -----------------------------------------------------------------------------
# Training


@dataclass
class Settings:
    steps: int = 700  # optimizer steps in all
    batch_size: int = 16  # sequences a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches for a step: smaller activations, whole gradients
    max_len: int = 128  # tokens (here bytes) the model looks back
    d_model: int = 128  # width
    n_heads: int = 4  # heads of attention; divides d_model
    n_layers: int = 2  # blocks; each is a unit that is gathered and dropped as one
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
    replicate: int = 1  # HSDP: so many replicas, each sharded over processes / replicate
    recompute: bool = False  # activation checkpointing: only blocks' inputs are kept
    exact: bool = False  # 2 processes bitwise as 1 with accumulate 2: slower clipping and AdamW
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one, else cpu
    out: str = "out/train_fsdp"  # checkpoints, final weights, log.jsonl and report.json go here
    seed: int = 0  # same seed, same weights


# These may differ between two starts of a run, as may the number of processes and threads.
MAY_CHANGE = "compile eval_every save_every keep timeout replicate recompute device out".split()


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

    scaler = torch.amp.GradScaler(p.device.type, enabled=s.amp == "fp16")  # fp16 loses small gradients
    if run["step"]:
        scaler.load_state_dict(run["scaler"])
    signals = Signals(p)
    batches = micro_batches(text, run["step"], s, p)
    x, y, n_next = next(batches)
    bar = tqdm(initial=run["step"], total=s.steps, unit="step", disable=None if p.rank == 0 else True)
    for step in range(run["step"], s.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        n_tokens = n_next  # of all ranks and micro-batches
        loss_sum = torch.zeros((), device=p.device)
        for micro in range(s.accumulate):
            torch.manual_seed((s.seed * 1_000_003 + step) * 4_096 + micro * p.world + p.rank)  # dropout
            # Gradients are averaged and sliced after the last micro-batch alone; until then each rank
            # sums whole ones: more memory, less traffic.
            model.set_requires_gradient_sync(micro == s.accumulate - 1)
            logits = model(x).to(getattr(torch, s.dtype))  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")  # ()
            # The mean of the step's tokens on all ranks; world undoes the averaging over ranks.
            scaler.scale(loss * (p.world / n_tokens)).backward()
            loss_sum = loss_sum + loss.detach()
            x, y, n_next = next(batches)  # made and sent while a GPU is still busy with backward
        scaler.unscale_(optimizer)  # before clipping, or it would clip scaled gradients
        norm = clip_gradients(model, s.clip or math.inf, s.exact)  # ()
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
        run["step"] = step + 1
        run["tokens"] += n_tokens
        run["train_seconds"] += time.perf_counter() - start
        run["losses"].append(loss)
        bar.update()
        last = run["step"] == s.steps
        if last:
            run["held"] = memory_held(model, optimizer, p)
        if last or run["step"] % s.eval_every == 0:
            dev_loss = evaluate(model, dev, p)
            check_finite("held-out loss", dev_loss, step)
            on_rank_0(partial(log, run, dev_loss, norm, bar, s, p), p)
        if last or stopped or (s.save_every and run["step"] % s.save_every == 0):
            tensors = state_tensors(model, optimizer)
            state = run | {"scaler": scaler.state_dict()}
            path = save_checkpoint(Path(s.out), run["step"], tensors, state, p, s.keep)
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
def evaluate(model: nn.Module, text: tuple[Tensor, Tensor], p: Processes) -> float:
    """Mean loss of all tokens of text, nats: each row on one rank, once."""
    model.eval()
    inputs, targets = text
    losses = []
    for chunk in torch.arange(len(inputs)).split(64 * p.world):
        rows = chunk[p.rank :: p.world]
        taking_part = rows if len(rows) else chunk[:1]  # every rank has slices: none may miss a forward
        logits = model(inputs[taking_part].to(p.device)).flatten(0, 1)  # (B T, V)
        y = targets[taking_part].to(p.device).flatten()
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float)), y, reduction="sum")
        losses.append(loss * (len(rows) > 0))  # a borrowed row counts 0
    model.reshard()  # the root waits for a backward that doesn't come
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
    """tokens (B, T) of 0 .. 255, T <= max_len -> logits (B, T, 256) of the next byte. See initialise."""

    def __init__(self, d_model: int, n_heads: int, n_layers: int, max_len: int, dropout: float = 0.0):
        super().__init__()
        self.recompute = False
        self.embedding = nn.Embedding(256, d_model)
        self.position = nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:  # recompute: in backward, from its input
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V), tied to the embedding


def sharded_model(s: Settings, p: Processes) -> GPT:
    """On the meta device it has shapes and no memory; then each rank makes room for its slices."""
    with torch.device("meta"):
        model = GPT(s.d_model, s.n_heads, s.n_layers, s.max_len, s.dropout)
    model.to(getattr(torch, s.dtype))
    shard(model, make_mesh(s.replicate, p.device, s.timeout), s.amp, s.compile)
    model.to_empty(device=p.device)
    initialise(model, s.seed)
    model.recompute = s.recompute
    return model


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
    if s.amp != "off" and (s.dtype != "float32" or s.exact):
        raise ValueError(f"amp {s.amp} needs dtype float32 and no exact, got {s.dtype}")
    if p.world % s.replicate:
        raise ValueError(f"replicate {s.replicate} doesn't divide {p.world} process(es)")


def differences(there: dict, here: dict) -> str:
    """Which settings differ, with both values, as text; "" if none does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


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


def open_run(out: Path, settings: dict, kept: list) -> tuple[Path | None, dict]:
    """For rank 0: the newest checkpoint's path, or None, and the state of OUT's run, or of a new one; the
    report, if it is finished. kept gets OUT's lock. ValueError for another run."""
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    path = run = None
    if (out / "final.pt").exists() and (out / "report.json").exists():
        with suppress(ValueError):  # a damaged one is made again
            run = json.loads((out / "report.json").read_text())
    if run is None:
        out.mkdir(parents=True, exist_ok=True)
        kept.append(lock_out(out))
        for left in out.glob("step_*.part"):  # of a killed process
            shutil.rmtree(left)
        if list(out.glob("step_*.pt")):
            raise ValueError(f"{out} holds a run of train_ddp.py; give another --out")
        path, run = newest_checkpoint(out)
    if run is None:
        run = {"settings": settings, "step": 0, "tokens": 0, "train_seconds": 0.0, "losses": [], "log": []}
    wrong = differences(run.get("settings", {}), settings)
    if wrong:
        raise ValueError(f"{out} holds a run of other settings ({wrong}); give another --out")
    return path, run


def full_weights(model: nn.Module, p: Processes) -> dict[str, Tensor]:
    """The plain model's state dict, on rank 0's CPU; {} on the others."""
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor()  # gathered one by one; every rank has to come here
        if p.rank == 0:
            weights[name] = whole.cpu()
    return weights


def finish(weights: dict[str, Tensor], run: dict, s: Settings, p: Processes) -> dict:
    """For rank 0, after the last step: the weights, a table; with report.json the run is finished."""
    import safetensors.torch

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_atomically(Path(s.out, "final.pt"), buffer.getvalue())
    write_atomically(Path(s.out, "final.safetensors"), safetensors.torch.save(weights, {"format": "pt"}))
    size = sum(weight.nbytes for weight in weights.values())
    held = {"all": {"weights": size, "gradients": size, "moments": 2 * size}}
    held |= {f"rank {rank}": of_rank for rank, of_rank in enumerate(run["held"])}
    print("MiB held between steps")
    for who, row in held.items():
        print(f"{who:9}" + "".join(f"{kind} {size / 2**20:,.3f}  " for kind, size in row.items()))
    report = run | run["log"][-1] | {"finished": True, "held": held, "processes": p.world}
    report["n_parameters"] = sum(weight.numel() for weight in weights.values())
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
        settings = asdict(s) | {"text": digest, "script": "train_fsdp.py"}
        wrong = differences(on_rank_0(lambda: settings, p), settings)
        if wrong:
            raise ValueError(f"rank {p.rank} was started with other settings than rank 0: {wrong}")
        kept = []  # rank 0 keeps OUT's lock
        path, run = on_rank_0(partial(open_run, Path(s.out), settings, kept), p)
        if p.rank == 0:
            print(f"{settings} processes={p.world} device={p.device} from_step={run['step']}", flush=True)
        if not run.get("finished"):
            model = sharded_model(s, p)
            optimizer = make_optimizer(model, s)
            if path:
                load_tensors(path, state_tensors(model, optimizer), p)
            training = True
            train(model, optimizer, text, dev, run, s, p)
            weights = full_weights(model, p)
            run = on_rank_0(partial(finish, weights, run, s, p), p)
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
