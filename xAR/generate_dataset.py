"""Make the synthetic set S with an xAR model: `neon generate --family xar`; the paper's: --preset xar_b or xar_l."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "xar")
