"""Fine-tune VAR-d16 on its own samples: `neon selftrain --family var --recipe d16_256`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "var", "--recipe", "d16_256")
