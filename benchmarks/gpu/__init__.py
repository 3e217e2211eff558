"""What a GPU makes of this project, in one command: `python -m benchmarks.gpu` (`make gpu-check`).

card.py       all that needs CUDA, and what stands for it in a rehearsal on the CPU
targets.py    which networks, at which sizes, with random weights
bench.py      what all measurements share; measurements, rows, time limit, results file
suite.py      tests marked `cuda`
parity.py     the card next to the CPU on the same noise
speed.py      matrix products, sampling, and its parts
training.py   self-training; ranks.py: what several processes run under torchrun
page.py       results/gpu/*.json → Markdown and docs/gpu.md
"""
