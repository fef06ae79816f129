"""The command line `minitron-hf`: parses arguments, calls the public functions, prints their results.

May import: everything.
"""

from .entry import main as main
