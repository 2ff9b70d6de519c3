"""Where the measurements of a search run: in this process, or on workers of Ray."""
