"""From a trained module to the fastest correct model: formats, int8, pruning, and the evidence.

Demo, one thread of an AMD EPYC, pruned int8: 2.9 times eager PyTorch's speed, 0.27 of its size.

    python export.py                # demo: trains a small classifier, exports it every way, compares
    python export.py --threads 2    # every setting is a flag; --help lists them

Jacob et al., arXiv:1712.05877 (int8); Michel et al., "Are Sixteen Heads Really Better than One?",
arXiv:1905.10650 (importance of heads); Molchanov et al., arXiv:1906.10771 (neurons; squared there).
Shapes: B batch, T tokens, C = d_model, H heads, D width of a head, N examples, K classes.
"""

import contextlib
import copy
import inspect
import io
import json
import logging
import os
import platform
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime writes an id to the home folder
LOADING = threading.Lock()  # torch.export.load takes one thread at a time, and fails in the others

# -----------------------------------------------------------------------------
# 1. TorchScript: what a trace freezes


class Gate(nn.Module):
    """Control flow that depends on a value: doubles x if its sum is positive, else negates it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a trace with a positive example keeps this side for all inputs, silently
            return 2 * x
        return -x


def export_torchscript(model: nn.Module, example_inputs, path, method="trace") -> Path:
    """TorchScript (.ts), by method "trace" (records one run) or "script" (compiles the source).

    Deprecated in torch. example_inputs: a tensor or a tuple of them. A trace freezes an `if` as the
    example took it; a script keeps it, and refuses what its subset of Python lacks. Like all exporters
    here it leaves the model alone, and raises ValueError for one that torch refuses or gets wrong.
    """
    if method not in ("trace", "script"):
        raise ValueError(f'method must be "trace" or "script", got "{method}"')
    model, inputs = prepare(model, example_inputs)
    with torch.no_grad(), refusing(f"TorchScript can't {method} {type(model).__name__}"):
        made = torch.jit.trace(model, inputs) if method == "trace" else torch.jit.script(model)
        made = torch.jit.freeze(made)
    return write_checked(path, ".ts", partial(torch.jit.save, made), model, inputs)


def prepare(model: nn.Module, example_inputs) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model for evaluation (it may train in another thread), and a tuple of inputs."""
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"example_inputs must be tensors, got {[type(x).__name__ for x in inputs]}")
    inputs = tuple(x.detach().clone() for x in inputs)  # .pt2 stores them, of a view its base
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), refusing(f"{type(model).__name__} refuses its example_inputs"):
        model(*inputs)
    return model, inputs


@contextlib.contextmanager
def refusing(what: str):
    """Turn an exporter's error, of whichever of its many types, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {reason or type(error).__name__}") from error


def free_sizes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, str], ...]:
    """For each input what stays free by default, {dimension: name}: the batch, and the length T."""
    batch = next((len(x) for x in inputs if x.dim()), 0)
    lengths = {x.size(1) for x in inputs if x.dim() == 2 and not x.is_floating_point()}
    sizes = []
    for i, x in enumerate(inputs):
        free = {}
        if x.dim() and len(x) == batch:
            free[0] = "batch"
            if x.dim() in (2, 3) and x.size(1) in lengths:  # (B, T) integers, floats as long
                free[1] = f"length_{i}" if i else "length"  # to onnxruntime a name is one size
        sizes.append(free)
    return tuple(sizes)


def other_sizes(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs cut to one row, a place shorter; and with a row and a place more."""
    less = list(inputs)
    more = list(inputs)
    for i, free in enumerate(free_sizes(inputs)):
        for dim in free:
            left = 1 if dim == 0 else max(1, inputs[i].size(1) - 1)
            less[i] = less[i].narrow(dim, 0, left)
            more[i] = torch.cat((more[i], more[i].narrow(dim, 0, 1)), dim)
    return [tuple(less), tuple(more)]


@torch.no_grad()
def write_checked(path, suffix: str, save: Callable, model, inputs: tuple, free=True) -> Path:
    """Write an artefact, load it, and move it to path once it gives the model's outputs.

    free: at other sizes too, but for those that the model itself refuses (longer than its max_len).
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as folder:
        beside = Path(folder, "artefact" + suffix)
        save(beside)
        run = load_artefact(beside)
        for trial in [inputs, *other_sizes(inputs)] if free else [inputs]:
            try:
                expected = model(*trial)
            except Exception:
                continue
            sizes = [list(x.shape) for x in trial]
            with refusing(f"the {suffix} of {type(model).__name__} is wrong for inputs {sizes}"):
                for output, wanted in zip(tensors_in(run(*trial)), tensors_in(expected), strict=True):
                    largest = wanted.double().nan_to_num(0, 0, 0).abs().max().item()
                    tolerance = {"rtol": 0.0, "atol": 1e-3 * max(1.0, largest)}
                    torch.testing.assert_close(output, wanted, **tolerance, equal_nan=True)
        os.replace(beside, path)  # readers see the old file or the new one
    return path


def tensors_in(output) -> list[Tensor]:
    """A model's output as a list: one tensor, or those of a tuple, list or dict."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output or ()
    return [x for part in parts for x in tensors_in(part)]


def load_artefact(path) -> Callable[..., Tensor]:
    """A file written here as a function of tensors; .onnx, .pt2 or .ts tells what it is.

    An ONNX file keeps the number of threads that torch has now. ValueError: another or a damaged file.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2", ".ts"):
        raise ValueError(f"a file ends in .onnx, .pt2 or .ts, got {path}")
    data = path.read_bytes()
    with refusing(f"{path} is damaged"):
        if path.suffix == ".onnx":
            return onnx_runner(data)
        if path.suffix == ".pt2":
            with LOADING:
                return torch.export.load(io.BytesIO(data)).module()
        return torch.jit.load(io.BytesIO(data))


# -----------------------------------------------------------------------------
# 2. torch.export: the whole graph, or an error; and bf16


def capture(model: nn.Module, inputs: tuple, dynamic_shapes=None):
    """The operators of a model in evaluation mode as a torch.export.ExportedProgram."""
    if dynamic_shapes is None:  # in an example they must be 2 or more: a 1 is refused, as a constant
        free = torch.export.Dim.DYNAMIC
        dynamic_shapes = tuple(dict.fromkeys(sizes, free) for sizes in free_sizes(inputs))
    with torch.no_grad(), refusing(f"torch.export can't capture {type(model).__name__}"):
        return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)


def export_program(model: nn.Module, example_inputs, path, dynamic_shapes=None) -> Path:
    """A torch.export program (.pt2), as fast as eager PyTorch. As export_torchscript, but:

    It is whole or refused: an `if` on a tensor's value is an error; torch.where is the way out.
    dynamic_shapes: as torch.export's; None: batch and integers' T are free (an LSTM's T is refused).
    """
    model, inputs = prepare(model, example_inputs)
    save = partial(torch.export.save, capture(model, inputs, dynamic_shapes))
    return write_checked(path, ".pt2", save, model, inputs, dynamic_shapes is None)


def has_bf16() -> bool:
    """True if this CPU multiplies bf16 itself; others emulate it, many times slower than fp32."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))


def to_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bf16 (8 of 24 bits of precision); takes integers or bf16. ValueError: a slow CPU."""
    if not has_bf16():
        raise ValueError("this CPU has no bf16 arithmetic (avx512_bf16, amx_bf16): it would be slow")
    return copy.deepcopy(model).bfloat16()


# -----------------------------------------------------------------------------
# 3. ONNX: one file for every runtime


def attention_for_onnx(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """F.scaled_dot_product_attention, with its arguments, written out.

    The exporter's own translation takes up to 1.6 times as long in onnxruntime, and a query without keys
    gets the mean of the values, not 0. With opset 23 and the mask expanded it takes 0.9 times as long and
    gives 0 (assets/export_attention.json), but needs a new runtime.
    """
    if enable_gqa:  # a head of keys serves several of queries
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.mT  # (..., Tq, Tk)
    if is_causal:  # top-left
        attn_mask = torch.ones_like(scores).bool().tril() & (True if attn_mask is None else attn_mask)
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(scores.dtype)
    allowed = ~attn_mask.isneginf().all(-1, keepdim=True)  # (..., Tq or 1, 1)
    lowest = torch.finfo(scores.dtype).min / 2  # softmax of -inf alone would be NaN
    return (scores + attn_mask.clamp(min=lowest)).softmax(-1) @ value * allowed


def export_onnx(model: nn.Module, example_inputs, path, dynamic_shapes=None, metadata=None) -> Path:
    """One ONNX file, which runs wherever onnxruntime does. The rest as in export_program.

    The inputs are named as forward's arguments are, the output "output". metadata (labels, max_len, a
    vocabulary) is a dict of what JSON can hold. Each value is read by
    json.loads(session.get_modelmeta().custom_metadata_map[name]).
    """
    model, inputs = prepare(model, example_inputs)
    program = capture(model, inputs, dynamic_shapes)
    names = list(inspect.signature(model.forward).parameters)[: len(inputs)]
    shapes = dynamic_shapes or free_sizes(inputs)  # for the names in it
    options = {"opset_version": 20, "dynamo": True, "verbose": False, "output_names": ["output"]}
    attention = torch.ops.aten.scaled_dot_product_attention.default  # also in torch's own modules
    with refusing(f"ONNX can't express {type(model).__name__}"):
        program = program.run_decompositions({attention: attention_for_onnx})
        made = torch.onnx.export(program, input_names=names, dynamic_shapes=shapes, **options)
    graph = made.model_proto
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.value_info):
        part.ClearField("metadata_props")  # stack traces, with this machine's paths
    for key, value in (metadata or {}).items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    data = graph.SerializeToString()
    free = dynamic_shapes is None
    return write_checked(path, ".onnx", lambda file: file.write_bytes(data), model, inputs, free)


def onnx_runner(data: bytes) -> Callable[..., Tensor]:
    """The bytes of an ONNX file as a function of tensors on the CPU.

    Sum and norm stay two kernels: onnxruntime's fused one takes five times as long.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised, and needn't be printed as well
    rest = {"disabled_optimizers": ["SkipLayerNormFusion"]}
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"], **rest)
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
        outputs = tuple(map(torch.from_numpy, session.run(None, feed)))
        return outputs if len(outputs) > 1 else outputs[0]

    run.metadata = session.get_modelmeta().custom_metadata_map  # what export_onnx was given, as JSON
    return run


# -----------------------------------------------------------------------------
# 4. int8 by hand, and by onnxruntime


def int8_product(x: Tensor, weight: Tensor, bits=8, per_channel=True) -> Tensor:
    """x (N, in) @ weight.T (in, out), multiplied and added in integers; one scale, or one a row of weight."""
    levels = 2 ** (bits - 1) - 1  # 127: -128 has no twin
    w_scale = weight.abs().amax(1 if per_channel else (0, 1), keepdim=True) / levels
    x_scale = x.abs().max() / 127
    w_int = (weight / w_scale).round().clamp(-levels, levels).int()  # off by half a unit at most
    x_int = (x / x_scale).round().clamp(-127, 127).int()
    sums = x_int @ w_int.T  # exact: int32 holds 133,000 products of 127 * 127
    return sums * x_scale * w_scale.T


# A CPU without VNNI adds two products of activations (0 .. 255) and 8-bit weights in 16 bits: 2 * 255 * 127
# = 64,770 is above 32,767 and saturates, silently. With 7-bit weights it is 32,130. So 7 bits are the
# default, whatever the building machine can do: the file travels. For 8: reduce_range=False, and CPUs with
# VNNI alone, or sessions with the slower options.add_session_config_entry("session.x64quantprecision", "1").
MATRICES = ["MatMul", "Gemm"]  # norms, softmax and products of two activations stay fp32


def quantize_dynamic(onnx_path, path, embeddings=False, reduce_range=True) -> Path:
    """int8 weights, a scale for each output; activations are scaled anew in each run.

    For models made of matrix products (Transformers). embeddings: make the tables int8 as well, for
    size, not speed. reduce_range: 7 bits. Raises ValueError where onnxruntime refuses the file.
    """
    from onnxruntime import quantization

    options = {"per_channel": True, "reduce_range": reduce_range}
    kinds = MATRICES + ["Gather"] * embeddings
    with refusing(f"onnxruntime can't quantize {onnx_path}"):
        quantization.quantize_dynamic(onnx_path, path, kinds, **options)
    return Path(path)


def quantize_static(onnx_path, path, calibration: Iterable[dict], reduce_range=True) -> Path:
    """int8 weights, and int8 activations whose ranges are fixed beforehand.

    calibration: an iterable of input dicts, name -> tensor or array: a hundred real inputs.
    For devices that can't rescale: a Transformer's ranges differ, so the dynamic kind is closer.
    """
    from onnxruntime import quantization

    feeds = ({name: np.asarray(x) for name, x in inputs.items()} for inputs in calibration)
    reader = SimpleNamespace(get_next=lambda: next(feeds, None))
    options = {"per_channel": True, "reduce_range": reduce_range, "op_types_to_quantize": MATRICES}
    options["extra_options"] = {"MatMulConstBOnly": True}
    options["activation_type"] = quantization.QuantType.QUInt8  # signed ones are slower on x86
    with refusing(f"onnxruntime can't quantize {onnx_path}"):
        quantization.quantize_static(onnx_path, path, reader, **options)
    return Path(path)


# -----------------------------------------------------------------------------
# 5. Pruning: zeros, which bring no speed, and smaller matrices, which do


def prune_unstructured(model: nn.Module, amount: float) -> nn.Module:
    """A copy in which the smallest `amount` (0 .. 1) of the weights of Linear and Conv layers are 0.

    They are ranked over all layers together. Zeros bring no speed: a dense product multiplies by them.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in 0 .. 1, got {amount}")
    model = copy.deepcopy(model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = [(layer, "weight") for layer in model.modules() if isinstance(layer, kinds)]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer to prune")
    prune.global_unstructured(weights, prune.L1Unstructured, amount=float(amount))
    for layer, _ in weights:
        prune.remove(layer, "weight")  # write the zeros into the weight, without a mask beside it
    return model


# Heads and neurons that are gone for real. A convention says where they are:
# - an attention is a module with n_heads, qkv_proj (Linear to q, k, v of all heads, H * D wide each)
#   and out_proj (Linear from H * D), called as attention(x, mask): plain softmax attention;
# - a feed-forward net is an nn.Sequential of Linear, functions of single elements, Linear.

ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Dropout, nn.Identity)


class SelfAttention(nn.Module):
    """Attention with as many heads as qkv_proj has room for, H * D <= C. x (B, T, C) to (B, T, C)."""

    def __init__(self, qkv_proj: nn.Linear, out_proj: nn.Linear, n_heads: int):
        super().__init__()
        self.qkv_proj = qkv_proj
        self.out_proj = out_proj
        self.n_heads = n_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """name -> attention, by the convention above; ValueError for one that two modules share."""
    found = {}
    places = [child for parent in model.modules() for child in parent._modules.values()]
    for name, m in model.named_modules():
        if hasattr(m, "n_heads") and hasattr(m, "qkv_proj") and hasattr(m, "out_proj"):
            if sum(m is child for child in places) > 1:
                raise ValueError(f"{name} stands in two places of {type(model).__name__}")
            found[name] = m
    return found


def feed_forwards(model: nn.Module) -> dict[str, nn.Sequential]:
    """name -> feed-forward net, by the convention above."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Sequential) and len(m) > 2:
            first, *between, last = m
            is_net = isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            if is_net and all(isinstance(function, ELEMENTWISE) for function in between):
                found[name] = m
    return found


def head_importance(model: nn.Module, batches: Iterable, loss=None) -> dict[str, Tensor]:
    """Importance of heads (Michel): attention's name -> (H,).

    batches: an iterable of (inputs, targets). loss(outputs, targets): a sum over examples; None: the
    summed cross-entropy. ValueError for no batch or no attention.
    """
    model = copy.deepcopy(model).eval()
    readers = {name: (m.out_proj, m.n_heads) for name, m in attentions(model).items()}
    return importance(model, readers, batches, loss)


def neuron_importance(model: nn.Module, batches: Iterable, loss=None) -> dict[str, Tensor]:
    """The same for the neurons of feed-forward nets (Molchanov): net's name -> (d_ff,)."""
    model = copy.deepcopy(model).eval()
    readers = {name: (net[-1], net[-1].in_features) for name, net in feed_forwards(model).items()}
    return importance(model, readers, batches, loss)


def importance(model: nn.Module, readers: dict, batches: Iterable, loss) -> dict[str, Tensor]:
    """Mean over examples of |dloss/dgate|, for a gate of 1 on each of n heads: name -> (n,)."""
    if not readers:
        raise ValueError(f"{type(model).__name__} has no module as the convention describes it")
    loss = loss or partial(F.cross_entropy, reduction="sum")
    gates = {}

    def gated(name: str, n: int, _module, inputs: tuple) -> Tensor:
        (x,) = inputs  # (B, n * width) or (B, ..., n * width)
        if name not in gates:  # a Linear may be called several times
            gates[name] = x.new_ones(len(x), n, requires_grad=True)
        gate = gates[name].repeat_interleave(x.size(-1) // n, 1)
        return x * gate.view(len(x), *[1] * (x.dim() - 2), -1)

    for name, (linear, n) in readers.items():
        linear.register_forward_pre_hook(partial(gated, name, n))
    totals = {name: torch.zeros(n) for name, (_, n) in readers.items()}
    n_examples = 0
    for inputs, targets in batches:
        gates.clear()
        with torch.enable_grad():
            inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
            value = loss(model(*inputs), targets)
        for name, gradient in zip(gates, torch.autograd.grad(value, gates.values()), strict=True):
            totals[name] += gradient.abs().sum(0).cpu()
        n_examples += len(targets)
    if not n_examples:
        raise ValueError("batches must hold at least one (inputs, targets), got none")
    return {name: total / n_examples for name, total in totals.items()}


def prune_heads(model: nn.Module, importance: dict[str, Tensor], keep: int) -> nn.Module:
    """A copy whose attentions keep only their `keep` most important heads, in smaller matrices.

    importance: attention's name -> (H,). The copy equals the model with the other heads' outputs set to
    0. ValueError: another keep than 1 .. H, another attention than a plain one.
    """
    model = copy.deepcopy(model)
    for name, attention in attentions(model).items():
        kept = most_important(name, importance.get(name, ()), attention.n_heads, keep)
        model.set_submodule(name, smaller_attention(attention, kept))
    return model


def prune_neurons(model: nn.Module, importance: dict[str, Tensor], keep: int) -> nn.Module:
    """A copy whose feed-forward nets keep only their `keep` most important neurons. As prune_heads."""
    model = copy.deepcopy(model)
    for name, net in feed_forwards(model).items():
        kept = most_important(name, importance.get(name, ()), net[0].out_features, keep)
        shrink(net[0], rows=kept)
        shrink(net[-1], columns=kept)
    return model


def load_pruned(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """An unpruned model's copy with sizes and weights of a pruned one's state dict, or ValueError."""
    model = copy.deepcopy(model)
    with refusing(f"this is no state dict of a pruned {type(model).__name__}"):
        for name, attention in attentions(model).items():
            width = attention.out_proj.in_features // attention.n_heads
            n_heads = state[f"{name}.out_proj.weight"].size(1) // width
            model.set_submodule(name, smaller_attention(attention, torch.arange(n_heads)))
        for name, net in feed_forwards(model).items():
            d_ff = len(state[f"{name}.0.weight".removeprefix(".")])  # "" is the model itself
            shrink(net[0], rows=slice(d_ff))
            shrink(net[-1], columns=slice(d_ff))
        model.load_state_dict(state)
    return model


def most_important(name: str, scores: Tensor, n: int, keep: int) -> Tensor:
    """Indices (keep,) of the largest scores (n,), in ascending order."""
    if len(scores) != n or not 1 <= keep <= n:
        raise ValueError(f"{name}: keep must be in 1 .. {n} of {n} scores, got {keep}, {len(scores)}")
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def smaller_attention(attention: nn.Module, kept: Tensor) -> SelfAttention:
    """The attention with these heads (kept,) alone; ValueError if it does more than SelfAttention."""
    H = attention.n_heads
    weight = attention.qkv_proj.weight  # (3 * H * D, C)
    smaller = SelfAttention(attention.qkv_proj, attention.out_proj, H).eval()
    x = torch.linspace(-2, 2, 10 * weight.size(1)).cos().view(2, 5, -1).to(weight)  # (B, T, C)
    mask = torch.tensor([5, 3]).view(2, 1, 1, 1) > torch.arange(5)
    with torch.no_grad(), refusing(f"{type(attention).__name__} is not plain softmax attention"):
        y = copy.deepcopy(attention).eval()(x, mask.to(x.device))
        torch.testing.assert_close(y, smaller(x, mask.to(x.device)), rtol=1e-3, atol=1e-4)
    shrink(smaller.qkv_proj, rows=torch.arange(len(weight)).view(3, H, -1)[:, kept].flatten())
    shrink(smaller.out_proj, columns=torch.arange(len(weight) // 3).view(H, -1)[kept].flatten())
    smaller.n_heads = len(kept)
    return smaller.train(attention.training)


def shrink(linear: nn.Linear, rows=slice(None), columns=slice(None)) -> None:
    """Keep these rows and columns of the weight, and rows of the bias; what is frozen stays so."""
    weight = linear.weight.detach()[rows][:, columns].clone()
    linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach()[rows].clone()
        linear.bias = nn.Parameter(bias, linear.bias.requires_grad)
    linear.out_features, linear.in_features = weight.shape


# -----------------------------------------------------------------------------
# 6. The evidence: latency, size, accuracy, side by side


@torch.no_grad()
def benchmark(runners: dict[str, Callable], cases: dict[str, list[tuple]], seconds=1.0) -> dict:
    """Latency of all runners in alternating rounds: a busy moment hits all.

    runners: name -> function of tensors. cases: name -> list of inputs, each timed by itself, for
    `seconds` a runner and 5 rounds at least, on the threads that torch has. Returns runner -> case ->
    {p50_ms, p90_ms, throughput in examples a second}.
    """
    draw = random.Random(0)
    results = {name: {} for name in runners}
    for case, batches in cases.items():
        times = {name: [] for name in runners}
        until = time.perf_counter() + seconds * len(runners)
        rounds = 0
        while rounds < 6 or time.perf_counter() < until:
            rounds += 1
            for name in draw.sample(list(runners), len(runners)):
                runners[name](*batches[0])  # untimed: the others have filled the caches
                for inputs in batches:
                    start = time.perf_counter()
                    runners[name](*inputs)
                    times[name].append(time.perf_counter() - start)
        n_examples = sum(len(inputs[0]) for inputs in batches) / len(batches)
        for name, spent in times.items():
            spent = np.array(spent[len(batches) :])  # the first round warmed up
            p50, p90 = np.percentile(1000 * spent, (50, 90)).round(3).tolist()
            throughput = round(n_examples / spent.mean().item(), 1)
            results[name][case] = {"p50_ms": p50, "p90_ms": p90, "throughput": throughput}
    return results


@torch.no_grad()
def outputs_on(run: Callable, examples: list) -> Tensor:
    """Logits (N, K) for examples, a list of (tuple of inputs, labels)."""
    return torch.cat([run(*inputs).float() for inputs, _ in examples])


def formats(model: nn.Module, example, calibration, stem: str, metadata=None) -> dict[str, Callable]:
    """name -> a function that writes the model in that format, to stem and its suffix."""
    onnx = stem + ".onnx"
    return {
        "TorchScript, trace": lambda: export_torchscript(model, example, stem + ".trace.ts"),
        "TorchScript, script": lambda: export_torchscript(model, example, stem + ".script.ts", "script"),
        "torch.export": lambda: export_program(model, example, stem + ".pt2"),
        "torch.export, bf16": lambda: export_program(to_bfloat16(model), example, stem + ".bf16.pt2"),
        "ONNX": lambda: export_onnx(model, example, onnx, metadata=metadata),
        "ONNX int8, dynamic": lambda: quantize_dynamic(onnx, stem + ".int8.onnx"),
        "ONNX int8, dynamic, embeddings": lambda: quantize_dynamic(onnx, stem + ".e8.onnx", True),
        "ONNX int8, static": lambda: quantize_static(onnx, stem + ".static.onnx", calibration),
    }


def export_all(models, example, dev, cases, calibration, out, metadata=None, case="", min_agreement=0.99,
               seconds=1.0, only=()) -> dict:  # fmt: skip
    """Write every format of the models into the folder out, measure them, and recommend one.

    models: name -> classifier; the first is the original, pruned ones follow. dev: a list of (tuple of
    inputs, labels), no test set. cases: as benchmark takes them; case: the one that counts for you, by
    default the first. Recommended is the fastest there of those that answer as the original does on
    min_agreement (0 .. 1) of dev. only: names of formats; int8 needs "ONNX".
    Returns {"models": rows, "refused": name -> why, "recommended", ...}.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    original = copy.deepcopy(next(iter(models.values()))).eval()
    torch.save(original.state_dict(), out / "weights.pt")
    files = {"eager": out / "weights.pt"}
    runners = {"eager": original}
    refused = {}
    print("\nwritten; all but int8 compared with their models:")
    for i, (label, model) in enumerate(models.items()):
        for name, write in formats(model, example, calibration, str(out / label), metadata).items():
            if only and name not in only:
                continue
            name = f"{label}, {name}" if i else name
            try:
                files[name] = write()
                runners[name] = load_artefact(files[name])
                print(f"  {name:44s}{files[name].stat().st_size / 1000:8,.0f} kB", flush=True)
            except ValueError as error:
                refused[name] = str(error)
                print(f"  {name:44s}not possible: {error}", flush=True)
    case = case or next(iter(cases))
    timings = benchmark(runners, cases, seconds)
    labels = torch.cat([labels for _, labels in dev])
    expected = outputs_on(original, dev)
    rows = []
    for name, run in runners.items():
        outputs = outputs_on(run, dev)
        answers = outputs.argmax(-1)
        row = {"name": name, "file": files[name].name, "size_bytes": files[name].stat().st_size}
        row["accuracy"] = (answers == labels).double().mean().item()
        row["agreement"] = (answers == expected.argmax(-1)).double().mean().item()
        row["max_abs_diff"] = (outputs - expected).abs().max().item()
        row["batch"], row["seq_len"], *_ = (*cases[case][0][0].shape, None)  # None: of vectors
        row["latency"] = timings[name]
        rows.append(row | timings[name][case])
    agreeing = [row for row in rows if row["agreement"] >= min_agreement]
    best = min(agreeing, key=lambda row: row["p50_ms"])
    report = {"models": rows, "refused": refused, "recommended": best["name"], "case": case}
    return report | {"threads": torch.get_num_threads()}


def print_table(report: dict) -> None:
    """The rows of export_all's report, and the recommendation in words."""
    rows = report["models"]
    print(f"\np50 in ms by batch x tokens, {report['threads']} thread(s); accuracy on dev:")
    print(f"{'':40s}  size kB  accuracy  agreement  max |d|", *(f"{case:>9s}" for case in rows[0]["latency"]))
    for row in rows:
        times = [f"{timing['p50_ms']:9.2f}" for timing in row["latency"].values()]
        facts = f"{row['accuracy']:10.2%}{row['agreement']:11.2%}{row['max_abs_diff']:9.0e}"
        print(f"{row['name']:40s}{row['size_bytes'] / 1000:9,.0f}{facts}", *times)
    best = next(row for row in rows if row["name"] == report["recommended"])
    speed, size = rows[0]["p50_ms"] / best["p50_ms"], best["size_bytes"] / rows[0]["size_bytes"]
    print(f"recommended for {report['case']}: {best['name']}, {speed:.1f} x as fast, {size:.2f} of the size")


def plot_rows(report: dict, path: str | Path) -> Path:
    """Accuracy against latency; a point's area is the size of its file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    accuracies = [100 * row["accuracy"] for row in report["models"]]
    axes.set_ylim(min(accuracies) - 0.5, max(accuracies) + 0.5)
    for i, row in enumerate(report["models"]):
        point = (row["p50_ms"], accuracies[i])
        area = 400 * row["size_bytes"] / report["models"][0]["size_bytes"]
        label = f"{i + 1}  {row['name']}, {row['size_bytes'] / 1000:,.0f} kB"
        axes.scatter(*point, s=area, alpha=0.6, label=label)
        axes.annotate(str(i + 1), point, (0, 9 * (i % 5)), textcoords="offset points")
    axes.set(xlabel=f"p50 latency, {report['case']} (ms)", ylabel="accuracy on dev (%)", xlim=(0, None))
    figure.legend(loc="outside right upper", fontsize=8, markerscale=0.5)
    figure.savefig(path, dpi=110)
    return Path(path)


# -----------------------------------------------------------------------------
# Demo: a classifier of generated sentences: what comes after "but" counts, and "not" turns it


@dataclass
class Settings:
    threads: int = 1  # threads of every model compared
    seconds: float = 0.08  # benchmark time a model and size
    min_agreement: float = 0.98  # fraction of dev on which a recommended model must agree
    out: str = "out/export"  # artefacts, picture and report.json go here
    seed: int = 0  # same seed, same sentences and weights


class Classifier(nn.Module):
    """A pre-norm encoder: (B, T) ids, 0 = padding, to (B, 2) logits; T <= max_len."""

    def __init__(self, vocab_size: int, max_len=256, d_model=64, n_heads=4, n_layers=2, d_ff=256):
        super().__init__()
        C = d_model
        self.embedding = nn.Embedding(vocab_size, C)
        angles = torch.arange(max_len)[:, None] * 10_000 ** -(torch.arange(0, C, 2) / C)
        self.register_buffer("positions", torch.cat((angles.sin(), angles.cos()), 1))  # (max_len, C)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            layer = {"self_attention_norm": nn.LayerNorm(C), "ffn_norm": nn.LayerNorm(C)}
            layer["self_attention"] = SelfAttention(nn.Linear(C, 3 * C), nn.Linear(C, C), n_heads)
            layer["ffn"] = nn.Sequential(nn.Linear(C, d_ff), nn.GELU(), nn.Linear(d_ff, C))
            self.layers.append(nn.ModuleDict(layer))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0  # (B, T)
        x = self.embedding(tokens) + self.positions[: tokens.size(1)]  # (B, T, C)
        for layer in self.layers:
            attended = layer["self_attention_norm"](x)
            x = x + layer["self_attention"](attended, real[:, None, None, :])
            x = x + layer["ffn"](layer["ffn_norm"](x))
        x = self.norm(x) * real[:, :, None]
        return self.head(x.sum(1) / real.sum(1, keepdim=True).clamp(min=1))  # padding alone: the head's bias


GOOD = ["clever", "gripping", "fresh", "superb", "warm"]
BAD = ["dull", "lifeless", "stale", "awful", "tedious"]
NOUNS = ["plot", "acting", "music", "script", "ending", "cast"]
WORDS = ["padding", "the", "was", "not", "but", *GOOD, *BAD, *NOUNS]


def generate_sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """n (sentence, label), 1 = positive; no sentence twice."""
    rng = random.Random(seed)
    sentences = {}
    while len(sentences) < n:
        clauses = []
        for _ in range(rng.choice((1, 2, 3))):
            good = rng.randrange(2)
            negated = rng.randrange(2)
            word = rng.choice(GOOD if good else BAD)
            clauses.append(f"the {rng.choice(NOUNS)} was {'not ' * negated}{word}")
        sentences[" but ".join(clauses)] = good ^ negated  # what comes after "but" is what is meant
    return list(sentences.items())


def encode(sentences: list[tuple[str, int]]) -> list[tuple[tuple, Tensor]]:
    """Batches of 50, ((tokens (B, T),), labels (B,))."""
    ids = [torch.tensor([WORDS.index(word) for word in text.split()]) for text, _ in sentences]
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True).split(50)
    labels = torch.tensor([label for _, label in sentences]).split(50)
    return [((x,), y) for x, y in zip(tokens, labels, strict=True)]


def train(model: nn.Module, batches: list, epochs: int, lr: float) -> nn.Module:
    """AdamW under one cycle of the learning rate, on batches of ((tokens,), labels)."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(batches))
    model.train()
    for (tokens,), labels in batches * epochs:
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(run: Callable, examples: list) -> float:
    labels = torch.cat([labels for _, labels in examples])
    return (outputs_on(run, examples).argmax(-1) == labels).double().mean().item()


def show_control_flow(out: Path) -> dict[str, str]:
    """Captured with a positive example, asked about a negative one."""
    x = torch.ones(2, 3)
    writers = {
        "TorchScript, trace": lambda: export_torchscript(Gate(), x, out / "gate.ts"),
        "TorchScript, script": lambda: export_torchscript(Gate(), x, out / "gate.ts", "script"),
        "torch.export": lambda: export_program(Gate(), x, out / "gate.pt2"),
    }
    found = {}
    print("\nan `if` on a value, captured while it is true, asked while it is false:")
    for name, write in writers.items():
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints what it refuses
                run = load_artefact(write())
            found[name] = "right" if torch.equal(run(-x), Gate()(-x)) else "wrong, silently"
        except ValueError:
            found[name] = "refused"
        print(f"  {name:44s}{found[name]}")
    return found


def show_int8_by_hand(weight: Tensor) -> dict[str, float]:
    """Relative error of a product whose weight (out, in) has one large row."""
    x = torch.randn(100, weight.size(1))
    exact = x @ weight[1:].T
    weight = torch.cat((100 * weight[:1], weight[1:]))
    errors = {}
    print("\nint8 by hand: error of a product, beside one row of large weights:")
    for bits, per_channel in ((8, True), (7, True), (8, False)):
        name = f"{bits} bits, " + ("a scale a row" if per_channel else "one scale for all")
        y = int8_product(x, weight, bits, per_channel)[:, 1:]
        errors[name] = ((y - exact).norm() / exact.norm()).item()
        print(f"  {name:44s}{errors[name]:8.2%}")
    return errors


def show_zeros(model: nn.Module, dev: list, inputs: list[tuple], seconds: float) -> dict:
    """Accuracy and time of dense and sparse models, side by side."""
    print("\npruning: the smallest weights set to 0 bring no speed")
    pruned = {f"{amount:.0%} zeros": prune_unstructured(model, amount) for amount in (0, 0.5, 0.9)}
    times = benchmark(pruned, {"": inputs}, seconds)
    found = {}
    for name, candidate in pruned.items():
        found[name] = {"accuracy": accuracy(candidate, dev), "p50_ms": times[name][""]["p50_ms"]}
        print(f"  {name:44s}accuracy {found[name]['accuracy']:.2%}, {found[name]['p50_ms']} ms")
    return found


def main(s: Settings) -> None:
    warnings.simplefilter("ignore")  # the exporters' warnings and log lines
    logging.disable(logging.WARNING)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    sentences = generate_sentences(5000, s.seed)
    train_set = encode(sentences[:3000])
    dev = encode(sentences[3000:4000])  # all choices are made on it
    test_set = encode(sentences[4000:])  # read once, for the model chosen
    model = train(Classifier(len(WORDS)), train_set, epochs=4, lr=3e-3)
    print(f"trained in {time.perf_counter() - start:.1f} s, e.g. {sentences[0]}")
    report = {"control_flow": show_control_flow(out)}
    report["int8_by_hand"] = show_int8_by_hand(model.layers[0]["ffn"][0].weight.detach())
    (tokens,) = dev[0][0]
    cases = {"1 x real": [(row[None, row != 0],) for row in tokens[:8]]}  # without their padding
    for b, t in ((1, 32), (1, 256), (32, 256)):
        cases[f"{b} x {t}"] = [(torch.randint(1, len(WORDS), (b, t)),)]
    report["zeros"] = show_zeros(model, dev, cases["32 x 256"], s.seconds)
    smaller = prune_heads(model, head_importance(model, train_set[:10]), keep=2)
    smaller = prune_neurons(smaller, neuron_importance(smaller, train_set[:10]), keep=64)
    print(f"without half of the heads, 3/4 of the neurons: accuracy {accuracy(smaller, dev):.2%},")
    smaller = train(smaller, train_set, epochs=1, lr=1e-3)
    print(f"after an epoch of fine-tuning {accuracy(smaller, dev):.2%}")
    models = {"original": model, "pruned": smaller}
    calibration = [{"tokens": tokens} for (tokens,), _ in train_set[:4]]
    metadata = {"labels": ["negative", "positive"], "max_len": 256, "words": WORDS}
    choice = {"case": "32 x 256", "min_agreement": s.min_agreement, "seconds": s.seconds}
    report |= export_all(models, tokens, dev, cases, calibration, out, metadata, **choice)
    print_table(report)
    best = next(row for row in report["models"] if row["name"] == report["recommended"])
    run = model if best["name"] == "eager" else load_artefact(out / best["file"])
    report["test_accuracy"] = accuracy(run, test_set)
    print(f"  accuracy on the test set, read once: {report['test_accuracy']:.2%}")
    print(f"open {plot_rows(report, out / 'accuracy_latency.png')}")
    report["seconds"] = round(time.perf_counter() - start, 1)
    report |= {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    (out / "report.json").write_text(json.dumps(report | {"settings": asdict(s)}, indent=1))
    summary = {key: report[key] for key in ("recommended", "test_accuracy", "seconds")}
    print(json.dumps(summary | {"report": str(out / "report.json")}))


if __name__ == "__main__":
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    main(tyro.cli(Settings, description=__doc__))
