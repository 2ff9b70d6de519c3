"""Where tests find files outside the packages."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real weights and data; tests that need them skip where it is missing
