"""Hostile inputs: files that lie, and a fuzzer. tests/hostile/files.py has the cases."""
