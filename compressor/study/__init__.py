"""Redundancy studies: redundancy by depth, position and kind of token, and the stability of its ranking."""
