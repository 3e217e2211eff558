"""Make the synthetic set S with VAR-d16: `neon generate --preset var_d16`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "var", "--preset", "var_d16")
