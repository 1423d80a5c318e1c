"""How large a UNet call may be: a bound on rows x pixels that halves when the memory was too small and grows back."""

from __future__ import annotations

_FIRST_PATIENCE = 32
_MAX_PATIENCE = 4096


class Bound:
    """Of the calls of one checkpoint. `most_pixels` is what its calls are taken to have room for."""

    def __init__(self, most_pixels: int) -> None:
        self._most_pixels = most_pixels
        self.pixels = most_pixels
        # Calls at the bound that must fit before it grows, and how many have.
        self._patience = _FIRST_PATIENCE
        self._num_fits = 0

    def allow(self, most_pixels: int) -> None:
        """Says anew what there is room for."""
        if self.pixels >= min(self._most_pixels, most_pixels):
            self.pixels = most_pixels
        self._most_pixels = most_pixels

    def max_rows(self, row_pixels: int) -> int:
        """How many rows of that size one UNet call may have."""
        return max(1, self.pixels // row_pixels)

    def shrink(self, num_rows: int, row_pixels: int) -> bool:
        """Halves the bound below a tick of so many rows that did not fit the memory. False: it was a single row."""
        num_rows = min(num_rows, self.max_rows(row_pixels))
        if self.pixels < self._most_pixels:  # it had grown again, too early
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        self._num_fits = 0
        if num_rows == 1:
            return False
        self.pixels = num_rows // 2 * row_pixels
        return True

    def fits(self, num_rows: int, row_pixels: int) -> None:
        """A tick of so many rows went well. After enough of them that the bound cut short, it grows by a quarter."""
        if self.pixels >= self._most_pixels or num_rows + 1 < self.max_rows(row_pixels):
            return
        self._num_fits += 1
        if self._num_fits >= self._patience:
            self._num_fits = 0
            self.pixels = min(self._most_pixels, max(self.pixels * 5 // 4, self.pixels + row_pixels))
