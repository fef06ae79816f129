"""The package page's text: links of README.md are absolute once `url` in setup.cfg names the repository."""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
parser = configparser.ConfigParser()
parser.read(ROOT / "setup.cfg", encoding="utf-8")
url = parser["metadata"].get("url")
text = (ROOT / "README.md").read_text(encoding="utf-8")
if url:
    text = re.sub(r"\]\((?!\w+:|#)", f"]({url.rstrip('/')}/blob/main/", text)
setup(long_description=text)
