"""`python -m compressor` is the command line."""

from compressor.cli import main

main()
