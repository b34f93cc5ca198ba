"""What a model is worth: benchmarks and their metrics."""
