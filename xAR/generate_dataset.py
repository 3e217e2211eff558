"""Make the synthetic set S with an xAR model: `neon generate --family xar`. Say how: --cfg and --flow_steps."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "xar")
