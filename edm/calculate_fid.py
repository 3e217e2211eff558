"""FID and IS of an EDM checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs."""

import argparse

from edm import family
from neon import NeonError
from neon.cli import command_line
from neon.cli.calculate_fid import add_output, calculate_fid
from neon.cli.options import count
from neon.sampling import parse_seeds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--network_pkl", required=True, help="original .pkl or .safetensors")
    p.add_argument("--ref", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--seeds", default="0-49999", help="one image per seed (default %(default)s)")
    p.add_argument("--max_batch_size", type=count, default=64, help="images per forward pass and process")
    p.add_argument("--class", dest="class_idx", type=int, help="sample this class only (default: drawn per seed)")
    add_output(p, family)
    args = p.parse_args()
    seeds = parse_seeds(args.seeds)

    def describe(model) -> str:
        if args.class_idx is not None and not 0 <= args.class_idx < model.label_dim:
            raise NeonError(f"--class {args.class_idx}: the network knows {model.label_dim} classes")
        kind = "conditional" if model.label_dim else "unconditional"
        return f"EDM {kind}, {args.num_steps} {args.solver} steps"

    calculate_fid(args, family, args.network_pkl, args.ref, seeds, args.max_batch_size, describe, args.class_idx)


if __name__ == "__main__":
    command_line(main)
