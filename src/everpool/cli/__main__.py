"""Lets `python -m everpool.cli` be the command `everpool`."""

from everpool.cli import main

if __name__ == "__main__":
    main()
