"""How well compressed networks answer, method by method: see tools/bench_quality.py."""
