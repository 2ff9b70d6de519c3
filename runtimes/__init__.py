"""The execution world: an ONNX file in, a running engine out.

Every module and package here except `base` is a target, and its name is what `--target` takes. A package holds the
target in its module `target`. No target imports torch at module level, nor its engine before it builds or loads, so
that listing the targets is quick and works everywhere.
"""

from runtimes.base.protocols import BuildError, BuildOptions, Engine, Runtime, RuntimesError, RuntimeUnavailable
from runtimes.base.registry import runtime, targets
from runtimes.base.timing import Latency, Speedup, interleave

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
