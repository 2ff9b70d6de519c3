"""Analyses: they read a graph and data, and change nothing."""
