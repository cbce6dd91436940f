"""Sampling maths over ComfyUI's KSampler internals."""
