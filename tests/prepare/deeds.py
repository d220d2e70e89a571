"""Work for decoders that does whatever its bytes say."""

import os
import resource
import signal
import time

from pipeline.errors import BadData, ConfigError
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.images import decode_square


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
