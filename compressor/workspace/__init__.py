"""The output folder, the search journal, progress of steps, and facts of the environment."""
