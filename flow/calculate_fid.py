"""FID and IS of a flow matching checkpoint, sampled and measured in memory. Alone or under torchrun."""

import argparse

from flow import family
from neon.cli import command_line
from neon.cli.calculate_fid import add_output, calculate_fid
from neon.cli.options import count
from neon.sampling import parse_seeds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model_ckpt", required=True, help="torchcfm's .pt or .safetensors")
    p.add_argument("--ref", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--seeds", default="0-49999", help="one image per seed (default %(default)s)")
    p.add_argument("--max_batch_size", type=count, default=64, help="images per forward pass and process")
    add_output(p, family)
    args = p.parse_args()

    def describe(model) -> str:
        steps = f"tol {args.tol:g}" if args.solver == "dopri5" else f"{args.num_steps} steps"
        return f"flow matching, {args.solver}, {steps}"

    calculate_fid(args, family, args.model_ckpt, args.ref, parse_seeds(args.seeds), args.max_batch_size, describe)


if __name__ == "__main__":
    command_line(main)
