"""What a bundle is worth against its original: numerics, accuracy, latency, size."""
