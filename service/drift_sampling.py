"""Which prompts of a stream are looked at: none twice, and no end user too often. Keeps salted hashes, no text.

The statistics take prompts for independent. Repeated ones, and those of one busy user, are not: a monitor that sees
them alarms at what is no drift.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections import OrderedDict, deque
from enum import StrEnum

MAX_SEEN = 2048
"""Prompts remembered; one that was last seen before so many others counts as new."""

USER_WINDOW, USER_SHARE = 64, 8
"""Of the latest `USER_WINDOW` new prompts at most `USER_SHARE` of one end user are looked at."""

HASH_BYTES = 8
SALT_BYTES = 16
_NOBODY = bytes(HASH_BYTES)
_HEADER = struct.Struct("<II")


class Skipped(StrEnum):
    """Why a prompt is not looked at."""

    DUPLICATE = "duplicate"
    CAPPED = "capped"


def new_salt() -> bytes:
    return secrets.token_bytes(SALT_BYTES)


class Sampling:
    """Of one stream; `salt` is its own, so hashes of two tenants cannot be compared."""

    def __init__(self, salt: bytes, state: bytes | None = None) -> None:
        self._salt = salt
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._users: deque[bytes] = deque(maxlen=USER_WINDOW)
        if state:
            self._restore(state)

    def skips(self, prompt: bytes, user: str | None) -> Skipped | None:
        """Whether this one is left out; `prompt` is anything that names it, `user` None for somebody unnamed."""
        if self._is_seen(self._hash(b"prompt", prompt)):
            return Skipped.DUPLICATE
        who = _NOBODY if user is None else self._hash(b"user", user.encode())
        if who != _NOBODY and self._users.count(who) >= USER_SHARE:
            self._users.append(_NOBODY)  # the window moves on, so the user's turn comes again
            return Skipped.CAPPED
        self._users.append(who)
        return None

    def state(self) -> bytes:
        return _HEADER.pack(len(self._seen), len(self._users)) + b"".join((*self._seen, *self._users))

    def _is_seen(self, prompt: bytes) -> bool:
        known = prompt in self._seen
        self._seen[prompt] = None
        self._seen.move_to_end(prompt)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return known

    def _restore(self, state: bytes) -> None:
        num_seen, _ = _HEADER.unpack_from(state)
        body = state[_HEADER.size :]
        hashes = [body[start : start + HASH_BYTES] for start in range(0, len(body), HASH_BYTES)]
        self._seen.update(dict.fromkeys(hashes[:num_seen]))
        self._users.extend(hashes[num_seen:])

    def _hash(self, kind: bytes, value: bytes) -> bytes:
        return hashlib.blake2b(value, digest_size=HASH_BYTES, salt=self._salt, person=kind).digest()
