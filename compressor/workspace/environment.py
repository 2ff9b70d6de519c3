"""The environment of a measurement: package versions, processor, GPUs and process memory."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "gguf",
    "xllamacpp",
    "numpy",
    "ray",
)


def environment() -> dict[str, object]:
    """Return versions and hardware as plain JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def reset_peak_memory() -> None:
    """Reset the peak that `peak_memory` returns; does nothing on systems other than Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the peak resident memory of this process since `reset_peak_memory`, in bytes.

    On macOS, which cannot reset the peak, it is the peak since the process started; on Windows it is None.
    """
    with contextlib.suppress(OSError, StopIteration):
        return _process_status("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def held_memory() -> int | None:
    """Return the current resident memory of this process in bytes, or None if the system does not report it."""
    with contextlib.suppress(OSError, StopIteration):
        return _process_status("VmRSS")
    return None


def own_memory() -> int | None:
    """Return the current memory of this process alone in bytes, without files and what it shares; None if unknown."""
    with contextlib.suppress(OSError, StopIteration):
        return _process_status("RssAnon")
    return None


def _process_status(name: str) -> int:
    """Return a field of /proc/self/status, which Linux states in kB, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver lists (Linux)."""
    names = []
    with contextlib.suppress(OSError):
        for path in sorted(driver.glob("*/information")):
            models = [line for line in path.read_text().splitlines() if line.startswith("Model:")]
            names += [line.split(":", 1)[1].strip() for line in models]
    return names


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
