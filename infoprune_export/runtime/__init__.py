"""Images and a prompt in, text out, from a bundle alone: no PyTorch, no transformers."""
