"""Which tokens of a GPU's cache belong to each sequence: the bookkeeping, without a tensor."""

# How many sequences are assumed to have outgrown half a region before any has: until it has seen
# more completions than this, a `Regions` expects most of them to be long.
PRIOR = 8


class Regions:
    """Regions as long as the longest sequence, each for one sequence or for two short ones.

    Few sequences become as long as they may. So if there are fewer regions than slots, a sequence
    starts in half of one and is moved to a whole one when it outgrows that. If there is none, it
    waits. That always ends: the halves never take the last region, so that is empty or belongs to
    a sequence that can go on. No space can be too scattered to use, since a half fits any sequence
    that has not outgrown one, and a region fits all.

    Attributes:
        count: of regions.
        half: the tokens that half a region holds; 0 if sequences get whole ones at once.
        starts: the first token of each slot's part of the cache.
        empty: regions that nothing uses.
        halves: the first tokens of the free halves whose other half is in use.
        grown, ended: how many sequences outgrew their half, and how many ended within it.
    """

    def __init__(self, count: int, length: int, slots: int):
        """``length`` is that of the longest sequence, in tokens."""
        self.count, self.length = count, length
        self.half = length // 2 if 1 < count < slots else 0
        self.starts: dict[int, int] = {}
        self.empty = list(reversed(range(count)))
        self.halves: list[int] = []
        self.grown = self.ended = 0
        self._short: set[int] = set()  # the slots in half a region

    def room(self, length: int) -> int:
        """How many sequences that begin with ``length`` tokens to admit now.

        As many as there is room for if sequences go on to outgrow their halves as often as so far.
        More would only wait for each other.
        """
        if length >= self.half:
            return len(self.empty)
        split = (len(self._short) + len(self.halves)) // 2
        possible = len(self.halves) + 2 * min(len(self.empty), self.count - 1 - split)
        outgrown = (self.grown + PRIOR) / (self.grown + self.ended + PRIOR)
        each = (1 + outgrown) / 2  # regions that a sequence is expected to need
        whole = len(self.starts) - len(self._short)
        expected = int((self.count - whole) / each) - len(self._short)
        return max(0, min(possible, expected))

    def take(self, slot: int, length: int) -> None:
        """Give ``slot`` a place for ``length`` tokens and more; there must be `room` for one."""
        if length >= self.half:
            self.starts[slot] = self.empty.pop() * self.length
            return
        if not self.halves:
            start = self.empty.pop() * self.length
            self.halves += [start + self.half, start]
        self.starts[slot] = self.halves.pop()
        self._short.add(slot)

    def has_outgrown(self, slot: int, length: int) -> bool:
        """Whether the part of ``slot`` is too small for ``length`` tokens."""
        return slot in self._short and length > self.half

    def grow(self, slot: int) -> bool:
        """Give ``slot`` a whole region instead of half of one; False if there is none now."""
        start, other = self.starts[slot], self._other_half(slot)
        if other in self.halves:
            self.halves.remove(other)
            self.starts[slot] = min(start, other)
        elif self.empty:
            self.halves.append(start)
            self.starts[slot] = self.empty.pop() * self.length
        else:
            return False
        self._short.remove(slot)
        self.grown += 1
        return True

    def release(self, slot: int) -> None:
        other = self._other_half(slot)
        start = self.starts.pop(slot)
        if slot not in self._short:
            self.empty.append(start // self.length)
            return
        self._short.remove(slot)
        self.ended += 1
        if other in self.halves:
            self.halves.remove(other)
            self.empty.append(start // self.length)
        else:
            self.halves.append(start)

    def _other_half(self, slot: int) -> int:
        start = self.starts[slot]
        return start - self.half if start % self.length else start + self.half
