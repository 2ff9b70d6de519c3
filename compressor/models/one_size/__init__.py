"""Models that are traced for one row of one size, because they read the size in Python, and computed for any rows."""
