"""Counts of tokens in a corpus → the tokens to keep; and the tokenizer that emits no others.

`pieces` knows each kind of tokenizer model, `required` what has to stay, `counts` counts a corpus, `choice` chooses,
`rewriting` writes the tokenizer of the student.

May import errors, files, data and models.
"""
