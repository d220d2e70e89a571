"""How failed expectations read: as what is wrong, with its number and examples.

The names of expectations say what should be (`validation.py`), and are part of the digest of a report.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_HAVE = {1: "1 image has", 0: "no image has"}
_ARE = {1: "1 image is", 0: "no image is"}
# By name, with # for its numbers, which {0}, {1} give back.
_FAILURES = {
    "there is at least one image": "there is no image",
    "every image has an id": "{have} no id",
    "ids are unique": "{have} the id of another",
    "no two images have equal pixels": "{have} the pixels of another",
    "at most #% are blank": "{are} blank, more than {0}%",
    "no image is blank": "{are} blank",
    "images are not nearly blank": "{are} blank or nearly so",
    "images are not blurred": "{are} blurred",
    "files have at least # px a side, so that none is enlarged": "{are} enlarged, from less than {0} px a side",
    "files are at most # times as long as wide": "{are} more than {0} times as long as wide, or as wide as long",
    "files have a usual pixel format": "{have} an unusual pixel format",
    "every image is in train, val or test": "{are} in no split",
    "some images are for training": "no image is for training",
    "some images are held out": "no image is for validation, or none for the test",
    "variants of one motif are in one split": "{are} in another split than variants of the same motif",
    "near duplicates are in one split": "{have} a near duplicate in another split",
    "captions have # to # characters": "{have} a caption of more than {1} characters",
    "every image has a caption": "{have} no caption",
    "captions read like text": "{have} a caption that does not read like text",
    "captions fit # tokens": "{have} a caption of more than {0} tokens, whose end is not used",
}


def failure(name: str, count: int, examples: tuple[str, ...]) -> str:
    """What is wrong where the expectation `name` failed for `count` images, some of which are `examples`."""
    have, are = _HAVE.get(count, f"{count} images have"), _ARE.get(count, f"{count} images are")
    text = _FAILURES[_NUMBER.sub("#", name)].format(*_NUMBER.findall(name), have=have, are=are)
    named = examples[:3]
    more = f" and {count - len(named)} more" if count > len(named) else ""
    return f"{text} ({', '.join(named)}{more})" if named else text
