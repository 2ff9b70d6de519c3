"""The graph, its sites, and every edit of fx nodes."""
