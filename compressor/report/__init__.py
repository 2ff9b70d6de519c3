"""Reports as JSON, tables, charts, HTML pages and model cards."""
