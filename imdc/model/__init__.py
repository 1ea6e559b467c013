"""What model is this: families, the parts of a loaded model, sizes from a config, loading."""
