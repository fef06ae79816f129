"""Runs the command line as `python -m minitron_hf.cli`."""

from .app import main

if __name__ == "__main__":
    main()
