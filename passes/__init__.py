"""Analyses and rewrites of fx graphs.

The package imports torch and the standard library only. `passes.graph.edit` is the only module that edits fx nodes.
"""
