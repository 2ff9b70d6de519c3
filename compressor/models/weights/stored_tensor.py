"""A weight in a safetensors file, which workers read too; the module loads no library of models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from compressor.models.base import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; `kind` is the dtype name of the file, such as BF16."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in the file."""
        return DTYPES[self.kind]

    def __call__(self) -> torch.Tensor:
        """Read the values as float32."""
        return self.as_stored().float()

    def as_stored(self) -> torch.Tensor:
        """Read the values in the dtype of the file.

        Raises:
            ModelError: the file is not on this machine, as on one that was not prepared for workers.
        """
        if not self.path.exists():
            raise ModelError(
                f"there is no file {self.path} on this machine; --max-memory reads weights when they are needed, and "
                "workers of a cluster read them on every machine under the same path, such as that of a shared file "
                "system."
            )
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor
