"""Task vectors: arithmetic, shaping, putting on, files."""
