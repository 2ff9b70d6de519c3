"""Readers of data sets of the package datasets: of the hub, and stored in files."""
