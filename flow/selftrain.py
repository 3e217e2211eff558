"""Fine-tune a flow matching model on its own samples: `neon selftrain --family flow`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "flow")
