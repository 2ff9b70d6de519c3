"""Run a graph: in memory, section by section, or with weights read from disk."""
