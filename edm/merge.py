"""Reverse the fine-tune of an EDM model: `neon merge --family edm`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("merge", "edm")
