"""FID and IS of an IMM checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs."""

import argparse

from imm import family
from neon.cli import command_line
from neon.cli.calculate_fid import add_images, add_output, calculate_fid, image_seeds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--network_pkl", required=True, help="original .pkl or .safetensors")
    add_images(p)
    add_output(p, family)
    args = p.parse_args()

    def describe(model: family.IMM) -> str:
        return f"IMM, {args.num_steps} {args.schedule} steps, cfg {args.cfg_scale:g}"

    calculate_fid(args, family, args.network_pkl, args.fid_stats, image_seeds(args), args.batch_size, describe)


if __name__ == "__main__":
    command_line(main)
