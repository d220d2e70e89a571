"""Work for decoders that does whatever its bytes say, and sources that fail."""

import json
import os
import resource
import signal
import time
from pathlib import Path

from pipeline.errors import BadData, ConfigError, StorageError
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.images import decode_square
from pipeline.prepare.limits import Limits
from pipeline.prepare.sources.files import missing
from pipeline.prepare.sources.folder import Folder

QUICK = Limits(max_pixels=10**6)  # so the decoders of such images are given two seconds


def act(content, where):
    """Does the deed that `content` names; any other word comes back in capitals."""
    match content.decode():
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(600)
        case "hog":
            return len(bytearray(2**30))
        case "refuse":
            raise BadData("E-IMG-005", where, "is damaged", "remove it")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "other":
            raise ConfigError("E-CFG-001", where, "x", "y")
        case "pid":
            return os.getpid()
        case "limits":
            return limits()
    return content.decode().upper()


def count_together(words):
    """Each word, and how many were sent with it; dies of the word FATAL."""
    if "FATAL" in words:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [(word, len(words)) for word in words]


def limits():
    """Core size, open files, whether Ctrl-C is ignored, threads of torch."""
    import torch

    core, files = (resource.getrlimit(name)[0] for name in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE))
    return core, files, signal.getsignal(signal.SIGINT) is signal.SIG_IGN, torch.get_num_threads()


def weigh(content: bytes, where: str, framing: Framing) -> tuple[DecodedImage, int]:
    """A framed picture, and the most memory in MB that this process ever held."""
    picture = decode_square(content, where, framing)
    return picture, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Faulty(Folder):
    """A folder whose files of the numbers `faults` fail as `fail` does, the first `times` times each."""

    def __init__(self, root: Path, faults=(), fail=None, times: int = 10**9) -> None:
        super().__init__(root, "raw", Framing(16, "crop", (255, 255, 255)))
        self._faults, self._fail, self._times = set(faults), fail, times
        self._met: dict[str, int] = {}

    def read(self, item, limit=2**30):
        number = int(Path(item.id).stem)
        if number in self._faults and self._met.get(item.id, 0) < self._times:
            self._met[item.id] = self._met.get(item.id, 0) + 1
            return self._fail(item)
        return super().read(item, limit)


def gone(item):
    raise FileNotFoundError(2, "No such file or directory", item.where)


def stale(item):
    raise OSError(116, "Stale file handle", item.where)


def silent(item):
    raise StorageError("E-IO-060", item.where, "cannot be read (timed out)", "check the network")


def moved(item):
    raise missing(item.where)


class Deadly(Folder):
    """A folder whose decoders die of the images listed in a file, as `how` says, until it is emptied."""

    def __init__(self, root: Path, how: str) -> None:
        super().__init__(root, "raw", Framing(16, "crop", (255, 255, 255), limits=QUICK))
        self._list, self._how = root / "deadly.json", how

    def decode(self, content, where):
        if Path(where).name in json.loads(self._list.read_text()):
            if self._how == "slow":
                while True:
                    pass
            if self._how == "large":
                raise MemoryError
            os.kill(os.getpid(), getattr(signal, self._how))
        return super().decode(content, where)
