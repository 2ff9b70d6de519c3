"""Reports as JSON, tables and pictures."""
