"""Benchmarks of kernels alone and of whole models, for the user's own GPU. They refuse to time what is wrong."""
