"""Passes that bring a traced graph into the form that all other passes expect; its outputs stay the same."""
