"""Visual question answering data in the official file formats."""
