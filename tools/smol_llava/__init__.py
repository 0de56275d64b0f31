"""The parts of `smol-llava` and how they become one model; see `tools/build_smol_llava.py`."""
