"""Make the synthetic set S with flow matching: `neon generate --preset flow_cifar10`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("generate", "flow", "--preset", "flow_cifar10")
