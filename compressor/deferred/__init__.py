"""Exports whose engine is built later, on another machine."""
