"""Fine-tune an xAR model on its own samples: `neon selftrain --family xar`; the paper's: --preset xar_b or xar_l."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "xar")
