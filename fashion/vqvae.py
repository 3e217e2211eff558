"""Train VAR's tokenizer on the clothes, as mini/vqvae.py does on digits."""

from fashion.settings import DEVICE, GPU, NETWORK
from mini.vqvae import main

if __name__ == "__main__":
    steps = 20_000 if GPU else 3_000
    main(NETWORK, "train.zip", "test.zip", "images", str(DEVICE["device"]), steps)
