"""Replies held to a JSON Schema or to the tools that may be called."""
