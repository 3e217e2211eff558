"""`python -m neon.cli`."""

from neon.cli import main

if __name__ == "__main__":
    main()
