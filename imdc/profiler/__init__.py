"""What a prefill took."""
