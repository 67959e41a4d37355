"""From llm's prompt to the engine's reply: models, turns, messages, the loaded engine."""
