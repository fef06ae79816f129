"""Pruning: scores and sizes → a plan; teacher and plan → a stock student, in memory or streamed from disk.

Belongs here: plans, surgery, repair, verification of students against the masked teacher.
May import: everything above it: `errors` to `models`, `families`, `sizes`, `scoring`, `losses`, `evaluation`,
`publishing`.
"""
