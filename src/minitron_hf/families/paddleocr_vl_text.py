"""PaddleOCR-VL's language model: ERNIE 4.5's layout."""

from .base import decoder

SPEC = decoder("paddleocr_vl_text")
