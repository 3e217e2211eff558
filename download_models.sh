#!/usr/bin/env bash
# Fill checkpoints/ and fid_stats/ from downloads.csv: the released checkpoints and the reference statistics, or
#   bash download_models.sh --base --vae      what the recipes start from
#   bash download_models.sh --all             everything
#   bash download_models.sh Neon_EDM_FFHQ.pkl ffhq-64x64.npz
# A file that is there and whole is skipped; a broken download is resumed. HF_ENDPOINT names a mirror of the hub.
set -euo pipefail
cd "$(dirname "$0")"
PATH="$PWD/.venv/bin:$PATH"
exec neon download "$@"
