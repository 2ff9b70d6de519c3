"""The targets by name, what they can do here, and engines that run in torch."""
