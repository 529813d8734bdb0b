"""All-to-alls whose ends the experts choose, so that rows travel beside products.

Rows that arrive are needed late: products begin with those of a rank's own tokens, which are there.
Rows that depart are made early: products end with those of own tokens, which stay. So each of a
layer's four all-to-alls is one function that begins it or waits for it, called wherever that suits
the experts. The price is that in between autograd's functions hand on rows that are not complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Arrival:
    """Rows of which this rank's own are in place and others are still on their way.

    Rows are filled in place, so nobody may copy them before.
    """

    def __init__(self) -> None:
        self._rest: Callable[[], None] | None = None

    def expect(self, rest: Callable[[], None]) -> None:
        """``rest`` waits for the others and puts them into place."""
        self._rest = rest

    def finish(self) -> None:
        """Make all rows complete; nothing to do where they are."""
        rest, self._rest = self._rest, None
        if rest is not None:
            rest()


class Departure:
    """Rows on their way from the rank that computed them.

    Args:
        send: starts to send the rows that it is called with, and returns what waits for what
            arrives here in their place.
    """

    def __init__(self, send: Callable[..., Callable[[], list[torch.Tensor]]]) -> None:
        self._send = send
        self._arriving: Callable[[], list[torch.Tensor]] | None = None

    def start(self, *rows: torch.Tensor) -> None:
        """Who has the rows may start, once."""
        self._arriving = self._send(*rows)

    def finish(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        """What has arrived. ``rows`` are those of :meth:`start`, called now if not before."""
        if self._arriving is None:
            self.start(*rows)
        arriving, self._arriving = self._arriving, None
        return arriving()


class Crossings(NamedTuple):
    """Those of one layer and micro-batch."""

    tokens: Arrival
    """Others' tokens, in dispatch."""
    results: Departure
    """Results for others, in combine."""
    gradients: Arrival
    """The gradients of those results, in combine's backward."""
    token_gradients: Departure
    """The gradients of others' tokens, in dispatch's backward."""
