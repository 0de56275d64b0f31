"""Deterministic image sets behind the embedded `tiny-llava` model."""
