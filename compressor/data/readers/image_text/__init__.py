"""Folders of images with a text for each, in the convention of ``datasets``: metadata.jsonl or metadata.csv."""
