"""Reverse an xAR fine-tune: `neon merge --family xar`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("merge", "xar")
