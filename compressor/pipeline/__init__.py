"""The three jobs: export, sweep and inspect, each as one straight line."""
