"""An image of a corpus before it is decoded, with its key and caption."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from torch import Tensor

from semhitok._messages import message
from semhitok.data.captions import MAX_TEXT, Caption, left_out, text_caption
from semhitok.data.images import decode_resized, read_resized, ten_crops


class Note(NamedTuple):
    """What the user should know about a unit, beside its images."""

    text: str


class Item(NamedTuple):
    """An image that is not decoded yet, or the reason why there is none.

    key: its name in the corpus.
    name: its name in messages.
    data: content of its file; or empty, and `path` is the file.
    caption: its caption.
    problem: why there is no image; empty if there is one.
    transient: the problem is that the unit could not be read to its end now, but may be later.
    caption_path: a text file that holds the caption in place of `caption`, if the file exists; or empty.
    """

    key: str
    name: str
    data: bytes = b""
    path: str = ""
    caption: Caption = Caption()
    problem: str = ""
    transient: bool = False
    caption_path: str = ""

    def crops(self, size: int, policy: str) -> Tensor:
        """The image as float32 [c, 3, size, size] in [0, 1]: c = 1 with the policy "centre", 10 with "ten".

        ValueError or OSError if there is no image, or it cannot be read.
        """
        if self.problem:
            raise ValueError(self.problem)
        side = size * 11 // 10 if policy == "ten" else size  # of what `ten_crops` needs
        image = read_resized(self.path, side) if self.path else decode_resized(self.data, self.name, side)
        return ten_crops(image, size) if policy == "ten" else image[None]

    def read_caption(self) -> Caption:
        """The caption; one that cannot be read is none, with a note."""
        if not self.caption_path:
            return self.caption
        try:
            if not stat.S_ISREG(os.stat(self.caption_path).st_mode):  # a pipe would be waited for
                return left_out(f"{self.caption_path}: expected a file, got something else")
            with open(self.caption_path, "rb") as file:
                return text_caption(file.read(MAX_TEXT + 1))
        except FileNotFoundError:
            return Caption()
        except OSError as error:
            return left_out(message(error))
