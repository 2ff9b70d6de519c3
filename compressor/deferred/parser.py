"""Hold the files of a deferred build to NVIDIA's parser, which runs without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.base.ahead_of_time import ahead_of_time
from runtimes.base.registry import runtime

# The targets whose parser is NVIDIA's, and the target whose package carries it without a GPU.
TARGETS = ("tensorrt", "tensorrt_rtx", "onnxruntime_rtx")
PARSER = "tensorrt_rtx"


def parsed_by(target: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Parse the ONNX files of a deferred build.

    Args:
        target: the target of the export.
        files: the ONNX file of each variant.

    Returns:
        The part ``parser`` of the report's engine, by that name: the builder with its version and the layers of each
        file, or why the files were not parsed. Empty for a target with another parser.

    Raises:
        BuildError: the parser refuses a file; the message names the layer of the model.
    """
    if target not in TARGETS:
        return {}
    builder = ahead_of_time(runtime(PARSER))
    assert builder is not None
    reason = builder.missing_builder()
    if reason is not None:
        return {"parser": {"unknown": reason}}
    layers = {name: asdict(builder.network_layers(path)) for name, path in files.items()}
    return {"parser": {"builder": builder.builder_version(), "files": layers}}
