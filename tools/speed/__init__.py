"""What `bench_speed.py` measures, section by section."""
