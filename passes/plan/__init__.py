"""Plans, which hold the decision for each site of a model, and their selection."""
