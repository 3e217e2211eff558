"""Make the synthetic set S with VAR-d36: `neon generate --preset var_d36`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "var", "--preset", "var_d36")
