"""Benchmarks for the user's own GPU: kernels alone, which are checked before they are timed, and whole models."""
