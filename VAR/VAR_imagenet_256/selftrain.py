"""Fine-tune VAR-d16 on its own samples: `neon selftrain --preset var_d16`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "var", "--preset", "var_d16")
