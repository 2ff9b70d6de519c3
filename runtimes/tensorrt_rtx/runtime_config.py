"""How an engine runs: CUDA graphs, kernels for the sizes of a call, and a cache of the kernels that were compiled.

Never run: all of it needs a GPU. The calls are type-checked against the library, and their order is tested on a fake.

- CUDA graphs: the library captures a call of given sizes once and replays it, which saves the launches of its kernels.
- Kernels are compiled for the sizes of a call before it runs. By default the library runs a slower kernel meanwhile and
  exchanges it later, so that the first timed calls would be those of another kernel.
- The cache is a file beside the engine. `build` writes it after one call of the usual sizes; the next process then
  opens the engine without compiling these kernels again. The library rejects a cache of another GPU or version, and
  compiles. The file is executable code, as the engine is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.tensorrt.build_steps import required
from runtimes.tensorrt.engine import Refused

if TYPE_CHECKING:
    import tensorrt_rtx as trt

SUFFIX = ".kernels"


def cache_path(engine: Path) -> Path:
    """Return the path of an engine's cache of kernels.

    >>> cache_path(Path("model.engine")).name
    'model.kernels'
    """
    return engine.with_suffix(SUFFIX)


def runtime_config(engine: trt.ICudaEngine, path: Path) -> tuple[trt.IRuntimeConfig, trt.IRuntimeCache]:
    """Return the configuration of an execution context of the engine at `path`, and its cache of kernels.

    The cache is empty if there is no file or the library rejects it. A CUDA context must be current.

    Raises:
        Refused: The library created no configuration or no cache.
    """
    import tensorrt_rtx as trt

    config = required(engine.create_runtime_config(), "it created no runtime configuration")
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache = required(config.create_runtime_cache(), "it created no cache of kernels")
    file = cache_path(path)
    if file.is_file():
        cache.deserialize(file.read_bytes())  # False for a cache of another GPU or version, which leaves it empty
    if not config.set_runtime_cache(cache):
        raise Refused("it rejected an empty cache of kernels")
    return config, cache
