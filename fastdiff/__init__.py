"""Sparse self-attention for any diffusers pipeline."""
