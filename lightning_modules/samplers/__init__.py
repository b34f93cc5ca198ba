"""The probability path and how it is walked."""
