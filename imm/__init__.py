"""Inductive Moment Matching (arXiv 2503.07565): class-conditional latents of ImageNet-256 in 1 to 8 steps."""
