"""Where a number was measured: device, versions, commit, clocks, and what the device could do at most."""
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.timing import FLUSH_BYTES

# dense bfloat16, from the vendors' data sheets; the first name that is part of the device's counts
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312, "B200": 2250}
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "xformers", "flash-attn", "liger-kernel", "cut-cross-entropy",
    "transfusion-pytorch")


def environment(device: str, commit: str | None = None) -> dict:
    """Return the device, versions, commit and clocks that a number needs beside it."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"CPU: {_cpu_name()}, {torch.get_num_threads()} threads", None
    return {
        "device": name,
        "device_memory_bytes": memory,
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": commit or _commit(),
        "flush_bytes": FLUSH_BYTES if device == "cuda" else 0,
        "clocks": clocks(),
    }


def clocks() -> dict | None:
    """Return what nvidia-smi says about clocks (MHz), power (W) and temperature (C); None without it."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    answer = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")))) if answer else None


def peak_tflops(device_name: str) -> float | None:
    """Return the device's dense bf16 peak; None for a device that the table lacks."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if changed else commit


def _cpu_name() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in (_output("cat", "/proc/cpuinfo") or "").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
