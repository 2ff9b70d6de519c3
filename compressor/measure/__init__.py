"""Engines built, held to torch and timed."""
