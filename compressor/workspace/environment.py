"""What a measurement was made on: versions, processor, memory."""

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
    "numpy",
)


def environment() -> dict[str, object]:
    """Versions and hardware as plain JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def forget_peak_memory() -> None:
    """Let `peak_memory` start anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Most memory this process has held since `forget_peak_memory`, in bytes.

    Since its start where the system cannot forget (macOS), None where it does not say (Windows).
    """
    with contextlib.suppress(OSError, StopIteration):
        return _of_process("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def held_memory() -> int | None:
    """Memory that this process holds now, in bytes; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        return _of_process("VmRSS")
    return None


def _of_process(name: str) -> int:
    """A figure in kB that Linux keeps of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Names of NVIDIA's GPUs, as their driver lists them (Linux)."""
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
