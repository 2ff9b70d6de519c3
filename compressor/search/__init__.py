"""From settings to a plan: by names, by a ranking, or by a search under budgets."""
