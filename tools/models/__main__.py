"""`python -m tools.models NAME`: makes a small random model and prints its folder."""

from __future__ import annotations

import argparse

from tools.models import RECIPES
from tools.models.recipe import random_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.models", description=__doc__)
    parser.add_argument("name", choices=list(RECIPES))
    print(random_model(RECIPES[parser.parse_args().name]))


if __name__ == "__main__":
    main()
