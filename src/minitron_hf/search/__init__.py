"""Architecture search: shapes within a budget → pruned, briefly distilled, ranked.

May import: everything above it.
"""
