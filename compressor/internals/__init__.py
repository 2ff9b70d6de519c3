"""What Compressor reads of the private and unstable parts of libraries, one module for each library."""
