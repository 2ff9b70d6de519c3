"""How redundancy is distributed over depth, positions and kinds of tokens, and how stable it is."""
