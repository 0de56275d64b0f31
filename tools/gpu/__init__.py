"""What `gpu_checks.py` measures, section by section."""
