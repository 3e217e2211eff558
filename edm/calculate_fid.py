"""FID and IS of an EDM checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs.

The number of steps is the paper's for such a network, unless given.
"""

import argparse
from collections.abc import Mapping

from edm import family
from neon import NeonError
from neon.cli import command_line
from neon.cli.calculate_fid import add_output, calculate_fid
from neon.cli.options import count, peek
from neon.sampling import parse_seeds
from neon.weights.checkpoint import check_metadata, open_weights


def papers_sampling(checkpoint: str | None) -> Mapping[str, object]:
    """The paper's sampling options for the network that a checkpoint records; {} for another network or none."""
    recorded = {}
    if checkpoint:
        with open_weights(checkpoint) as weights:
            recorded = check_metadata(weights, "init_kwargs")
    asked = [recorded.get(name) for name in ("img_resolution", "label_dim")]
    for row in family.presets.values():
        network = family.networks[row.network]
        if asked == [network["img_resolution"], network["label_dim"]]:
            return row.sampling
    return {}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--network_pkl", required=True, help="original .pkl or .safetensors")
    p.add_argument("--ref", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--seeds", default="0-49999", help="one image per seed (default %(default)s)")
    p.add_argument("--max_batch_size", type=count, default=64, help="images per forward pass and process")
    p.add_argument("--class", dest="class_idx", type=int, help="sample this class only (default: drawn per seed)")
    add_output(p, family)
    p.set_defaults(**papers_sampling(peek("--network_pkl")))
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
