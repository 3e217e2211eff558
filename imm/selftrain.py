"""Fine-tune IMM on its own samples: `neon selftrain --preset imm_t8`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "imm", "--preset", "imm_t8")
