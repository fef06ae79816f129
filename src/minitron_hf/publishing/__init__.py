"""Publishing: figures, the model card and the upload to the Hub, all made from the files of a run folder.

Belongs here: code that reads artefacts and writes what people see. No models are loaded.
May import: `errors`, `files`, `privacy`.
"""
