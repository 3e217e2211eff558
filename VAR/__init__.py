"""VAR: class-conditional images by next-scale prediction (Tian et al., arXiv 2404.02905)."""
