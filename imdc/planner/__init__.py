"""What a prefill will take, without torch: plan, predicted bytes, what fits."""
