"""Run a stage of the Fashion-MNIST scale, from fashion/, as mini/run.py does: `python -m fashion.run search edm`."""

from fashion import settings
from mini.run import main
from neon.cli import command_line

if __name__ == "__main__":
    command_line(lambda: main(settings))
