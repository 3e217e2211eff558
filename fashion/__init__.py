"""The Fashion-MNIST scale: the whole method on clothes at 28×28, between digits and the paper."""
