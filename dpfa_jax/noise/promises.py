"""Which promise each charged key was made for: another's noise may be less than was paid for.

Kept for the keys of this process, by their words; keys split or folded from them are unknown.
"""

import threading
from collections.abc import Hashable

import numpy as np

from dpfa_jax.core import ArgumentError

_lock = threading.Lock()
_promises: list[Hashable] = []
_numbers: dict[Hashable, int] = {}
# Words of the keys, sorted, and the number of each one's promise; what came since is sorted in when
# it is asked for. 12 bytes a key.
_words, _owners = np.empty(0, np.uint64), np.empty(0, np.int32)
_new: list[tuple[np.ndarray, int]] = []


def remember(key_data: np.ndarray, promise: Hashable) -> None:
    """The keys of these words (..., 2) uint32 were charged for `promise`."""
    with _lock:
        number = _numbers.setdefault(promise, len(_promises))
        if number == len(_promises):
            _promises.append(promise)
        _new.append((_joined(key_data), number))


def require(key_data: np.ndarray, promise: Hashable) -> None:
    """Refuses keys that were charged for another promise.

    Errors: ArgumentError that shows both.
    """
    words = _joined(key_data)
    with _lock:
        _sort_in()
        if not _words.size:
            return
        places = np.minimum(np.searchsorted(_words, words), _words.size - 1)
        for number in set(_owners[places[_words[places] == words]].tolist()):
            if _promises[number] != promise:
                raise ArgumentError(
                    "noise_key",
                    promise,
                    f"was charged for another release: {_promises[number]}",
                    "Charge the release that is answered: charge(ledger, release) gives its key.",
                )


def _joined(key_data: np.ndarray) -> np.ndarray:
    words = np.asarray(key_data, np.uint32).reshape(-1, 2).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _sort_in() -> None:
    global _words, _owners
    if not _new:
        return
    words = np.concatenate([_words, *(words for words, _ in _new)])
    owners = [np.full(words.size, number, np.int32) for words, number in _new]
    order = np.argsort(words, kind="stable")
    _words, _owners = words[order], np.concatenate([_owners, *owners])[order]
    _new.clear()
