"""The commands export, sweep and inspect: the order of their steps."""
