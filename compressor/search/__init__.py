"""Choose a plan from the settings: by site names, by a ranking, or by a search within budgets."""
