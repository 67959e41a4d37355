"""C sources, compiled for this processor and loaded."""
