"""Exports whose engine is built on another machine."""
