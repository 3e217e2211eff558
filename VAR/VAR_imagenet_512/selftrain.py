"""Fine-tune VAR-d36 on its own samples: `neon selftrain --family var --recipe d36_512`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "var", "--recipe", "d36_512")
