"""Between messages and token ids: tokenizer, template, thoughts, tool calls."""
