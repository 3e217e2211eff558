"""xAR: an image as a few cells of latents, each made by flow matching given the cells before it (arXiv 2502.20388)."""
