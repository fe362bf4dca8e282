"""Asserts the correctness of all of it, in the order of the files: values and gradients against independent
oracles, properties over random sizes, the scripts as subprocesses, downloads that break off.

    python test_all.py                    # everything; prints the slowest ten
    python test_all.py -x -q -k encoder   # any pytest option works
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# What the tests share


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Every test starts from the same random state; one thread, because CI's cores are shared (TORCH: 2 busy threads crawl)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference, relative to max(1, largest reference value); NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if actual.numel():
        difference = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert difference <= tolerance, f"{what}: {difference:.3e} > {tolerance:.0e}"


def run_script(name: str, *arguments: str, cwd: Path, folder: Path = ROOT, timeout: float = 120, **environment: str):
    """`python FOLDER/name arguments` in cwd; no data set is known there but what the arguments give."""
    env = {k: v for k, v in os.environ.items() if k not in ("IMDB_DATA", "MULTI30K_DATA")}
    env |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")} | environment
    command = [sys.executable, str(folder / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def check_one_line_error(result, *words: str) -> None:
    """What DESIGN calls a clear error: exit code 2, one line on stderr with these words, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def last_json(result) -> dict:
    """The report that a script prints as its last line."""
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return json.loads(result.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "--durations=10", *sys.argv[1:]]))
