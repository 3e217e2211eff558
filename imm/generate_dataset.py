"""Make the synthetic set S with IMM: `neon generate --preset imm_t8`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "imm", "--preset", "imm_t8")
