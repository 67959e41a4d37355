"""Fetch a repository and pack it in one pass, without a copy of it on disk."""
