"""Make the synthetic set S with an EDM model: `neon generate --family edm`; the paper's: --preset edm_ffhq64, …."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "edm")
