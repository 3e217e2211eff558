"""FID and IS of an xAR checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs.

Guidance and steps are those behind the paper's number for the model, unless given.
"""

import argparse

from neon import NeonError
from neon.cli import command_line
from neon.cli.calculate_fid import add_images, add_output, calculate_fid, image_seeds
from neon.cli.options import count, peek
from xAR import family


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True, choices=list(family.networks))
    p.add_argument("--model_ckpt", required=True, help=".pth, flat or a trainer's, or .safetensors")
    add_images(p)
    p.add_argument("--img_size", type=count, default=256, help="checked against the model (default %(default)s)")
    add_output(p, family)
    papers = {row.network: row.sampling for row in family.presets.values()}
    p.set_defaults(**papers.get(peek("--model"), {}))
    args = p.parse_args()

    def describe(model: family.Model) -> str:
        side = model.image_shape[-1]
        if side != args.img_size:
            raise NeonError(f"{args.model_ckpt} makes images of {side} pixels, not {args.img_size}")
        return f"{args.model}, {side} px, cfg {args.cfg:g}, {args.flow_steps} flow steps"

    network = family.networks[args.model]
    calculate_fid(
        args, family, args.model_ckpt, args.fid_stats, image_seeds(args), args.batch_size, describe, **network
    )


if __name__ == "__main__":
    command_line(main)
