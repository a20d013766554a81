"""Attention operators: tensors and a plan in, a tensor out; knows no model and no method."""
