"""What every target implements, how targets are found, and how engines are timed."""
