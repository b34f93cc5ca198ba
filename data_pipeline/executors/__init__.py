"""Executors: how tasks run. They know ranks and completion, never content."""
