"""Reverse the fine-tune of VAR-d36: `neon merge --family var`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("merge", "var")
