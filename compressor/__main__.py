"""`python -m compressor` is the command line."""

from compressor.cli.main import main

main()
