"""Texts, conversations, token ids and datasets → token rows, for calibration and measurement alike.

`loading` opens files and Hub datasets, `tokens` knows what a tokenizer adds, `documents` reads one document at a time,
`rows` cuts them into rows. Training data goes through TRL instead (`distillation/rows.py`).

May import errors, files, families, weights and models.
"""

from .batches import TokenRows as TokenRows
from .batches import padded_batches as padded_batches
from .batches import position_ids as position_ids
from .documents import DataSource as DataSource
from .documents import TokenizedDocuments as TokenizedDocuments
from .loading import load_text_dataset as load_text_dataset
from .rows import token_rows as token_rows
from .rows import tokenize_once as tokenize_once
from .tokens import start_tokens as start_tokens
from .tokens import tokenize as tokenize
