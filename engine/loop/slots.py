"""Which state slots are free. A slot number is the same in every worker's slab."""

from collections import Counter


class StateSlots:
    """Slots that somebody may still write to are withheld: nobody is given them, whoever owned them."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._withheld: Counter[int] = Counter()
        self._free_once_back: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_withheld(self) -> int:
        return len(self._withheld)

    def take(self) -> int:
        """A free slot, of which there must be one."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Its owner has no use for it."""
        if slot in self._withheld:
            self._free_once_back.add(slot)
        else:
            self._free.append(slot)

    def withhold(self, slot: int) -> None:
        """Until `give_back` was called as often."""
        self._withheld[slot] += 1

    def give_back(self, slot: int) -> None:
        self._withheld[slot] -= 1
        if not self._withheld[slot]:
            del self._withheld[slot]
            if slot in self._free_once_back:
                self._free_once_back.remove(slot)
                self._free.append(slot)
