"""States of earlier prompts, so that a conversation is read once."""
