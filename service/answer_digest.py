"""Enough of an answer to tell later whether a label equals it, and too little to tell what it was. Knows no row.

16 bits of a hash, salted with the completion's id: equal answers look unlike, one wrong label in 65 536 counts as
right, and a guess at a longer text is confirmed by no more than these 16 bits. Where only a handful of labels are
possible, whoever reads the database can try them all: no digest that answers the question could prevent that.
"""

from __future__ import annotations

import unicodedata
from hashlib import sha256

from adapters.scoring import canonical, plain

DIGEST_CHARACTERS = 4
MAX_JSON_CHARACTERS = 64 * 1024
"""Longer texts are compared as text: parsing them takes too long on the event loop."""


def answer_digest(completion_id: str, text: str) -> str:
    """Of the text as evaluations compare it: white space and the order of JSON keys make no difference."""
    form = _form(unicodedata.normalize("NFC", text))
    return sha256(f"{completion_id}\0{form}".encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_CHARACTERS]


def _form(text: str) -> str:
    if len(text) <= MAX_JSON_CHARACTERS:
        try:
            return canonical(text)
        except RecursionError:  # it could just be read, and not be written again
            pass
    return "text:" + plain(text)
