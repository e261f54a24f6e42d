"""Records that cannot be used: named once, counted by cause, and too many of them end the run.

Readers refuse a record with a sentence that names its place (file, row, part). That sentence is all
that is kept of a fault, in cost tables too, so its cause is told from the sentence.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

# The first that matches counts; what matches none is a conversation of the wrong form.
_CAUSES = {
    "json": r"is not JSON|conversation is null",
    "role": r"unknown role",
    "flag": r"none of the flags|unknown flag|need_\w+ is .*use true or false",
    "length": r"fits no pack",
    "size": r"is over (max_|the limit)|image over the limit|position table",
    "text": r"text is empty",
    "image": r"does not decode|not a readable|not base64|image mode",
    "damage": r"damaged|cannot be read|(was|are) recorded|is not listed|does not exist|bytes, .* says|"
              r"planned were",
}
CAUSES = (*_CAUSES, "form")


class Fault(NamedTuple):
    """A record that was left out: its group, and the sentence that says where and why."""

    group: str
    reason: str


def find_cause(reason: str) -> str:
    """One of CAUSES."""
    return next((cause for cause, pattern in _CAUSES.items() if re.search(pattern, reason)), "form")


class BadRecords:
    """Counts the bad records of a run. For one thread."""

    def __init__(self, sizes: Mapping[str, int], max_share: float):
        """Args: sizes of the groups in records; max_share of a group's records may be bad."""
        self._sizes, self._max_share = sizes, max_share
        self._named: dict[str, dict[str, None]] = {name: {} for name in sizes}    # in the order of their coming
        self._causes: Counter[str] = Counter()

    def add(self, fault: Fault) -> None:
        """Counts and names a fault; one that is known already is met again in a later epoch.

        Raises: ValueError with the reason if the group's allowance is spent.
        """
        named, size = self._named[fault.group], self._sizes[fault.group]
        if fault.reason in named:
            return
        named[fault.reason] = None
        self._causes[f"bad_{find_cause(fault.reason)}"] += 1
        allowed = self.allowed(fault.group)
        place = f"bad record {len(named)} of group {fault.group!r}"
        if len(named) > allowed:
            raise ValueError(f"{fault.reason} ({place}, more than the {allowed} of {size} that max_bad_share "
                             f"{self._max_share:g} allows); repair the data, or raise data.max_bad_share")
        logging.warning("left out %s, at most %d: %s", place, allowed, fault.reason)

    def allowed(self, group: str) -> int:
        """How many records of a group may be bad."""
        return int(self._sizes[group] * self._max_share)

    @property
    def faults(self) -> list[Fault]:
        """All that were added, by group."""
        return [Fault(group, reason) for group, reasons in self._named.items() for reason in reasons]

    @property
    def counts(self) -> dict[str, int]:
        """`bad_records`, and of those `bad_<cause>` for each cause that was met."""
        return {"bad_records": self._causes.total()} | self._causes
