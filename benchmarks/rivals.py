"""Quantize the dense model of an exported folder to int8 ONNX with another tool.

    python benchmarks/rivals.py TOOL FOLDER IMAGES OUTPUT

FOLDER is an export with `--factorial`. Each tool is used as in its documentation, with its own defaults. An environment
for all of them: `pip install onnxruntime "optimum-onnx[onnxruntime]" nncf pillow` (optimum-onnx needs an
older transformers than Compressor).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DENSE = Path("factorial") / "dense.float.onnx"


def onnxruntime_dynamic(folder: Path, images: Path, output: Path) -> None:
    """Quantize dynamically with ONNX Runtime: int8 weights of all matrix products, activation ranges at run time."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(folder / DENSE, output)


def optimum_dynamic(folder: Path, images: Path, output: Path) -> None:
    """Quantize dynamically with optimum-onnx, for processors with AVX512-VNNI."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    with tempfile.TemporaryDirectory() as scratch:
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        dense = shutil.copy(folder / DENSE, Path(scratch) / "model.onnx")
        ORTQuantizer(Path(dense)).quantize(config, save_dir=scratch)
        shutil.copy(Path(scratch) / "model_quantized.onnx", output)


def nncf_static(folder: Path, images: Path, output: Path) -> None:
    """Quantize with NNCF's post-training quantization for transformers, calibrated on images outside the test split."""
    import nncf
    import onnx

    model = onnx.load(folder / DENSE)
    name = model.graph.input[0].name
    batches = list(calibration(folder, images))
    data = nncf.Dataset(batches, lambda batch: {name: batch})
    onnx.save(nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)), output)


def calibration(folder: Path, images: Path) -> Iterator[Any]:
    """Yield preprocessed images [1, 3, H, W]: as many as in the export's calibration split, none of its test split."""
    from plain_onnxruntime import pixels

    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    data = json.loads((folder / "report.json").read_text())["data"]
    count, test = data["sizes"]["calibration"], set(data["test_ids"])
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*") if path.parent != images)
    for name in [name for name in names if name not in test][:: max(1, len(names) // (2 * count))][:count]:
        yield pixels(images / name, config)[None]


TOOLS: dict[str, Callable[[Path, Path, Path], None]] = {
    "ONNX Runtime dynamic int8": onnxruntime_dynamic,
    "optimum-onnx dynamic int8": optimum_dynamic,
    "NNCF int8": nncf_static,
}


if __name__ == "__main__":
    TOOLS[sys.argv[1]](*map(Path, sys.argv[2:5]))
