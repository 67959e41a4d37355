"""Constrain replies to a JSON Schema, or to calls of declared tools."""
