"""Generation: batches of continuations by a model, and training text that a teacher writes itself.

Belongs here: prompts as token ids, decoding with a seed for every row, and the dataset folder of generated rows.
May import: `errors`, `files`, `formats`, `locks`, `compat`, `hardware`, `weights`, `models`, `data`, `scoring`.
"""
