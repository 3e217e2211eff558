"""Fine-tune IMM on its own samples: `neon selftrain --family imm --recipe imagenet256`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "imm", "--recipe", "imagenet256")
