"""Read what is on disk: folders, headers, where every expert lies."""
