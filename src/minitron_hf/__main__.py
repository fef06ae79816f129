"""Runs the command line as `python -m minitron_hf`."""

from .cli.entry import main

if __name__ == "__main__":
    main()
