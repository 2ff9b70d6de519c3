"""The execution world: an ONNX file in, a running engine out.

Every file here that `base.NOT_TARGETS` does not name is a target, and its name is what `--target` takes. No file
imports torch, and none imports its engine before it is asked to build or load something, so that listing the targets
is quick and works everywhere.
"""

from runtimes.base import (
    BuildError,
    BuildOptions,
    Engine,
    Runtime,
    RuntimesError,
    RuntimeUnavailable,
    runtime,
    targets,
)
from runtimes.timing import Latency, Speedup, interleave

__all__ = [
    "BuildError",
    "BuildOptions",
    "Engine",
    "Latency",
    "Runtime",
    "RuntimeUnavailable",
    "RuntimesError",
    "Speedup",
    "interleave",
    "runtime",
    "targets",
]
