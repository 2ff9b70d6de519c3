"""Graph world: an fx graph in, an fx graph out.

Imports torch and the standard library only. One idea per file; ``edit`` is the only file that edits fx nodes.
"""
