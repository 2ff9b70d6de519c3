"""Parse and build the small architectures of the tests with TensorRT for RTX, in each precision; no GPU is needed.

    python benchmarks/tensorrt_engines.py [NAME ...] [--gpu sm89] [--again]

Each architecture is traced, folded and written as an export writes it: in each precision of the target, in fp16 with
merged tokens where they can be merged, and in int8 with the last attention as a fitted linear map. The weights are
random and the models small; the graphs are those of the real ones.

The results are written after each architecture; one that has results is left out unless --again is given.
`python benchmarks/tables.py` writes them into README.md.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from compressor.errors import CompressorError
from compressor.workspace.environment import environment
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.tensorrt_rtx import target

RESULTS = Path(__file__).parent / "results" / "tensorrt.json"
ROOT = Path(__file__).parents[1]
OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 8), lengths=(0, 8, 16))


def built(source: Path, out: Path, gpu: str) -> dict[str, Any]:
    """Parse and build one file; return what came of it, with the reason where it was refused."""
    row: dict[str, Any] = {"parsed": False, "built": False}
    try:
        row |= {"layers": asdict(target.network_layers(source)), "parsed": True, "onnx_bytes": source.stat().st_size}
        start = time.perf_counter()
        engine = target.build_for(source, out, OPTIONS, gpu)
    except RuntimesError as error:
        return row | {"reason": str(error)}
    return row | {"built": True, "seconds": time.perf_counter() - start, "bytes": engine.stat().st_size}


def zoo() -> ModuleType:
    """Return the module with the architectures, which belongs to the tests."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("tests.zoo_files")


def measured(name: str, gpu: str) -> dict[str, Any]:
    """Return the result of each form of an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {
                form: {"not_written": file} if isinstance(file, str) else built(file, Path(folder), gpu)
                for form, file in zoo().write_forms(name, Path(folder), target.int8)
            }
        except CompressorError as error:
            return {"fp32": {"not_written": str(error)}}


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--gpu", default="sm89", help="Compute capability to build for.")
@click.option("--again", is_flag=True, help="Repeat what has results.")
def main(names: tuple[str, ...], gpu: str, again: bool) -> None:
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"architectures": {}}
    content |= {"builder": target.builder_version(), "gpu": gpu, "environment": environment()}
    for name in names or zoo().NAMES:
        if name in content["architectures"] and not again:
            continue
        content["architectures"][name] = measured(name, gpu)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        forms = content["architectures"][name]
        print(name, {form: row.get("bytes", row.get("reason", row.get("not_written"))) for form, row in forms.items()})


if __name__ == "__main__":
    main()
