"""Where a model keeps what we compress: anatomy, families, loading, FLOPs."""
