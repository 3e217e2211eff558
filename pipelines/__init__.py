"""Pipelines of diffusers as a model family: `--family diffusers`."""
