"""Runs the GPU tests, several processes at a time, and writes what they said into one log.

    python -m tests.gpu.run --output benchmarks/results/h200/gpu_tests.txt

Most of their time is compiling on the CPU, so files run side by side, the long ones in shares, spread over the GPUs
that there are. The exit status is 1 if any failed. The log names GPU, driver, versions and commit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from queue import SimpleQueue

import torch

from seerattention.evaluate.environment import environment, machine_name

from .conftest import SHARE_VARIABLE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Files that take long, and in how many shares they run; first, so that none of them is left over at the end.
SHARES = {
    "test_block_sparse_attention.py": 6,
    "test_block_sparse_decode.py": 4,
    "test_spans.py": 4,
    "test_pooled_attention_decode.py": 5,
    "test_block_selection.py": 4,
    "test_gate_scores.py": 2,
    "test_chunk_replay.py": 3,
    "test_pooled_attention.py": 3,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) * 3 // 4), help="at one time")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for each")
    parser.add_argument("--output", type=Path, help="the log; default: only the terminal")
    parser.add_argument("files", nargs="*", help="default: all of tests/gpu, and tests/distill/test_gpu.py")
    options = parser.parse_args()
    found = [*HERE.glob("test_*.py"), ROOT / "tests" / "distill" / "test_gpu.py"]
    files = [Path(name) for name in options.files] or sorted(found, key=lambda path: (path.name not in SHARES, path))
    jobs = [(path, share) for path in files for share in shares(path)]
    log = Log(options.output)
    log.add(describe())
    gpus: SimpleQueue[str] = SimpleQueue()  # the GPU of each process that may start
    names = visible_gpus()
    for process in range(options.processes):
        gpus.put(names[process % len(names)])
    with ThreadPoolExecutor(options.processes) as pool:
        statuses = list(pool.map(lambda job: run_job(*job, gpus, options.timeout, log), jobs))
    log.add(f"== all files: {'passed' if not any(statuses) else 'FAILED'}")
    return int(any(statuses))


class Log:
    """Text that appears in the terminal at once, and in a file, the tests of one process at a time."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.text, self.lock = path, "", threading.Lock()

    def add(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            self.text += text + "\n"
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(self.text, encoding="utf-8")


def describe() -> str:
    """What the tests run on."""
    facts = environment()
    machine = machine_name(facts) if facts["devices"] else "no GPU"
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton", "transformers", "python"))
    return (
        f"GPU tests on {machine}, driver {facts['driver']}, {versions}, {date.today()}, commit "
        f"{facts['git_commit']}.\nFiles run side by side, so durations are upper bounds; they are mostly compiling.\n"
    )


def shares(path: Path) -> list[str]:
    """Into which shares a file's tests are dealt, as ``conftest.SHARE_VARIABLE`` takes them."""
    count = SHARES.get(path.name, 1)
    return [f"{number}/{count}" for number in range(1, count + 1)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = max(1, torch.cuda.device_count())
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def run_job(path: Path, share: str, gpus: SimpleQueue[str], timeout: float, log: Log) -> int:
    """Exit status of a share of one file's tests: pytest's, 124 after a time-out, negative where a signal ended it."""
    gpu = gpus.get()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=3"]
    visible = {"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.device_count() > 1 and not needs_all(path) else {}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*pytest, "-W", "ignore", str(path)],
            cwd=ROOT,
            env={**os.environ, **visible, SHARE_VARIABLE: share},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        status, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, said = 124, (error.stdout or b"").decode(errors="replace") + f"\ncut off after {timeout:.0f} s"
    gpus.put(gpu)
    name = path.resolve().relative_to(ROOT)
    part = "" if share == "1/1" else f", share {share}"
    log.add(f"== {name}{part} (exit status {status}, {time.monotonic() - started:.0f} s)\n{said.strip()}\n")
    return status


def needs_all(path: Path) -> bool:
    """Whether a file has tests for two GPUs: it sees all of them."""
    return "needs two GPUs" in path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
