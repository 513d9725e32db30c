"""Make a tiny Wan model with random weights, for demos and smoke runs without a download.

`streamprep.testing.tiny_model` draws it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from streamprep.testing.tiny_model import DEFAULT, VARIANTS, make_tiny_model


def main() -> None:
    """Read the command line, make the model, and say what was made."""
    parser = argparse.ArgumentParser(
        description="Make a tiny Wan model with random weights, as a folder that diffusers loads.",
        epilog="example: python tools/make_tiny_model.py /tmp/tiny-wan --variant 2.1-i2v --seed 0",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    parser.add_argument("--variant", choices=VARIANTS, default=DEFAULT, help=f"which Wan (default: {DEFAULT})")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        summary = make_tiny_model(args.out, seed=args.seed, variant=args.variant)
    except ValueError as error:
        parser.error(str(error))
    print(summary)


if __name__ == "__main__":
    main()
