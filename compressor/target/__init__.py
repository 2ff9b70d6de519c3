"""Targets by name, checks of their availability, and engines that run in torch."""
