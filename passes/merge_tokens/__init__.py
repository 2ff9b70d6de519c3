"""Merge similar tokens behind attention (ToMe), and carry the shorter axis through the graph."""
