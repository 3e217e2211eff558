"""The mini scale: the whole method on 8×8 digits."""
