"""Private APIs of huggingface_hub that `compressor` uses.

They were checked with huggingface_hub 1.31 and 2.4. tests/test_internals.py tests that no request is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants

__all__ = ["offline"]


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Send no request to the hub inside the block, whatever a configuration file names.

    The environment variable HF_HUB_OFFLINE is read when the library is imported; every request reads this constant.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
