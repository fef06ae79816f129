"""Runs the command line as `python -m minitron_hf.cli`."""

from .entry import main

if __name__ == "__main__":
    main()
