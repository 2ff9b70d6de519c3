"""The output folder, the environment, progress and the journal of a search."""
