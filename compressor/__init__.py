"""A deployment compiler for pretrained transformers: remove redundant branches, export, measure speed and quality.

>>> import compressor
>>> report = compressor.export("my_folder", data="images", drop="auto")  # doctest: +SKIP
>>> compressor.inspect("my_folder", data="images").rows()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.api import bench, export, inspect, sweep, targets
    from compressor.deferred.build import build
    from compressor.errors import CompressorError
    from compressor.settings import Settings

__version__ = "0.1.0"
__all__ = ["CompressorError", "Settings", "__version__", "bench", "build", "export", "inspect", "sweep", "targets"]

_HOMES = {
    "bench": "compressor.api",
    "build": "compressor.deferred.build",
    "export": "compressor.api",
    "inspect": "compressor.api",
    "sweep": "compressor.api",
    "targets": "compressor.api",
    "CompressorError": "compressor.errors",
    "Settings": "compressor.settings",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that importing the package does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
