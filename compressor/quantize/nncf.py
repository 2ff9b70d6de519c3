"""Int8 quantization by NNCF, the quantizer of OpenVINO, whose files OpenVINO sometimes runs faster than ours."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx

from compressor.data.rows import take_rows
from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, load, save
from runtimes.base.protocols import Feeds, first_line


class NncfError(CompressorError):
    """NNCF cannot quantize a model."""


def to_int8(source: Path, destination: Path, feeds: Callable[[], Iterable[Feeds]]) -> None:
    """Quantize a float ONNX file to int8 with NNCF's post-training quantization for transformers.

    All calibration batches are used, one sample at a time as NNCF expects.

    Raises:
        NncfError: NNCF cannot quantize the model.
    """
    with _quiet():
        samples = [sample for batch in feeds() for sample in _rows(batch)]
        try:
            import nncf

            model = nncf.quantize(
                load(source),
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(samples),
            )
        except Exception as error:  # NNCF's errors have no common base class, and its import may fail too
            raise NncfError(f"NNCF cannot quantize {source.name}: {first_line(error)}.") from error
    assert isinstance(model, onnx.ModelProto)
    save(model, destination, EXTERNAL_ABOVE)


def _rows(batch: Feeds) -> Iterator[Feeds]:
    for row in range(max(map(len, batch.values()))):
        yield take_rows(batch, [row])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence NNCF, which shows progress bars and logs every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
