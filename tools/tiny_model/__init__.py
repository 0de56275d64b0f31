"""Architecture, training objectives and scoring of the `tiny-llava` model."""
