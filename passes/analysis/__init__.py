"""Analysis passes, which measure a graph and do not change it."""
