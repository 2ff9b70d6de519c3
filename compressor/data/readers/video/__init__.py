"""Readers of videos: folders with the frames of each clip."""
