"""Streams of a round's key, `fold_in(key, stream)`, besides the clients' own, which are their ids: far past any.

NOBODY is the id of an empty slot where the number of clients is not known.
"""

SERVER, UPLINK, NOBODY, CLOCK, STOPWATCH, PUBLIC, TEACH, DOWNLINK = (2**31 - i for i in range(1, 9))
