"""Plans: the decisions of an export as data, and how they are selected."""
