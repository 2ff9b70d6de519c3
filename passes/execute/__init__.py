"""Execution of a graph: in memory, section by section, or with offloaded weights."""
