"""Fewer bits for the experts, and how good a model is: what it costs is measured here, too."""
