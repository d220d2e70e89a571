"""Fetching the files of coming batches ahead, and whether a cache has room for it."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data.folders import Folder
from pipeline.errors import ConfigError

LOOKS = 16  # coming batches that are looked at for each that is trained on, at most


def require_room(folder: Folder, size: int, num_images: int, shuffle_images: int) -> None:
    """Raise ConfigError where `num_images` images in files of `size` bytes do not fit into a cache, nor those of
    them that are shuffled together (0: all) with the next ones: nearly every image would have its file fetched."""
    if not folder.room:
        return
    most = num_images * folder.room // size
    if size <= 2 * folder.room or 0 < shuffle_images <= most:
        return
    problem = f"has {size / 2**30:.3g} GiB to read, {2 * folder.room / 2**30:.3g} fit into the cache"
    fix = (
        f"raise cache_gib of the profile, or set shuffle_images of the stage in params.yaml to {most} or less"
    )
    raise ConfigError("E-CFG-062", folder.where, problem, fix)


class LookAhead:
    """Has the files of coming batches fetched meanwhile: as many as there is room for, or those of one epoch."""

    def __init__(
        self, folder: Folder, files_at: Callable[[int], dict[str, int]], batch_size: int, epoch: int
    ) -> None:
        """`files_at(nimg)`: {name: bytes} of what the batch that starts at image `nimg` reads. `epoch`: images."""
        self._folder, self._files_at, self._batch_size, self._epoch = folder, files_at, batch_size, epoch
        self._next = 0  # nimg of the first batch that was not looked at
        self._sizes: dict[str, int] = {}  # of the files that were asked for
        self._needed: dict[str, int] = {}  # nimg of the last batch that reads each of them, so far

    def move_to(self, nimg: int) -> None:
        """Training is at the batch that starts at image `nimg`."""
        if not self._folder.room:
            return
        for name in [name for name, last in self._needed.items() if last < nimg]:
            del self._needed[name], self._sizes[name]
        self._next = max(self._next, nimg)
        asked = sum(self._sizes.values())
        for _ in range(LOOKS):
            if self._next > nimg + self._epoch or asked > self._folder.room:
                return
            sizes = self._files_at(self._next)
            new = {name: size for name, size in sizes.items() if name not in self._sizes}
            self._folder.expect(new)
            asked += sum(new.values())
            self._sizes |= new
            self._needed |= dict.fromkeys(sizes, self._next)
            self._next += self._batch_size
