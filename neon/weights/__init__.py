"""Weights in files: formats, pickles read as data, networks that record their arguments; what a merge did."""
