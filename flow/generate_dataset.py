"""Make the synthetic set S with a flow matching model: `neon generate --family flow`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "flow")
