"""Benchmarks: methods of decoding side by side, on the same tokens, in one process. Needs the extra `bench`."""
