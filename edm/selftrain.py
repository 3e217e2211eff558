"""Fine-tune an EDM model on its own samples: `neon selftrain --family edm`; the paper's: --preset edm_ffhq64, …."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "edm")
