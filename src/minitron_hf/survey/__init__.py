"""Looks at the architectures of Transformers: the matrix of supported families, and drafts of new tables.

May import: `errors`, `files`, `models`, `families`.
"""
