"""Rewrite passes, which edit a graph and return the names of the changed sites or nodes."""
