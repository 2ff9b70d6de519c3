"""Rewrites: each changes a graph and returns what it changed."""
