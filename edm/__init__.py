"""EDM (Karras et al. 2022, arXiv 2206.00364): diffusion on CIFAR-10 and FFHQ-64, and, in small, on digits."""
