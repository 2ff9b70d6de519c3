"""`compressor bench`: exported folders and other contenders compared side by side."""
