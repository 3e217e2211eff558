"""Reverse the fine-tune of IMM: `neon merge --family imm`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("merge", "imm")
