"""Fine-tune flow matching on its own samples: `neon selftrain --preset flow_cifar10`."""

from neon.cli import family_script

if __name__ == "__main__":
    family_script("selftrain", "flow", "--preset", "flow_cifar10")
