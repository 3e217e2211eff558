"""The `neon` commands of every stage, from settings.py by mini/plan.py: `python -m fashion.plan --out runs/plan`."""

from fashion import settings
from mini.plan import main

if __name__ == "__main__":
    main(settings)
