"""Reverse the fine-tune of a flow matching model: `neon merge --family flow`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("merge", "flow")
