"""Differentiable losses: tensors in, one loss a sample out. Pure torch."""
