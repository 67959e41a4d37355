"""From a request to tokens, one at a time."""
