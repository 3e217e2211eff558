"""Make the synthetic set S with VAR-d16: `neon generate --family var`, with the paper's guidance for S."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "var", "--cfg", "1.25")
