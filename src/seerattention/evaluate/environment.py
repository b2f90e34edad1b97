"""What a measurement ran on: versions, machine, git commit. Goes into every results file and into bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "machine_name"]

_PACKAGES = (
    "seerattention",
    "torch",
    "transformers",
    "accelerate",
    "triton",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
)


def environment() -> dict[str, Any]:
    """Versions (None: not installed), machine, devices, compiler and, in a source checkout, the git commit."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "compiler": _compiler(),
        "git_commit": _git_commit(),
    }


def machine_name(facts: Mapping[str, Any]) -> str:
    """What :func:`environment` found, in a word: ``2 x NVIDIA H200``, or the processor where there is no GPU."""
    devices = Counter(item["name"] for item in facts.get("devices", []))
    names = [name if count == 1 else f"{count} x {name}" for name, count in devices.items()]
    return ", ".join(names) or str(facts.get("processor", ""))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    return answer.split("\n")[0].strip() or None


def _compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _git_commit() -> str | None:
    """Commit of the source checkout that the package runs from, with ``+`` where files are changed; None when
    installed. ``SEER_GIT_COMMIT`` names it where a copy of the sources runs without its history.
    """
    if os.environ.get("SEER_GIT_COMMIT"):
        return os.environ["SEER_GIT_COMMIT"]
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.SubprocessError, OSError):
        return None
