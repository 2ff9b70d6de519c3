"""Readers of images with texts, for vision-language models."""
