"""What a policy made of prompts, what it was worth, and what to learn from it."""
