"""Text on both sides of the backbone: tokenizer, system prompt, sequence template, and the course of thinking."""
