"""Between messages and token ids: tokenizer, template, stop strings."""
