"""Networks that a loss looks through, under ComfyUI's model management."""
