"""Make the synthetic set S with IMM: `neon generate --family imm`, in 8 steps with the paper's guidance for S."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "imm", "--cfg_scale", "1.5")
