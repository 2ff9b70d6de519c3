"""Runtimes: build an engine from a model file, load it and time it.

Every module and package here except `base` is a target, named as `--target` takes it. A package holds its target in
the module `target`. No target imports torch at module level or its engine library before build() or load(), so listing
the targets is fast and works without the libraries.
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
