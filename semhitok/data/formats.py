"""Image formats: which are read, how a file's content tells its format, and which names count as images in a folder."""

from __future__ import annotations

import re

# Formats that are read, whatever a file is called. Pillow reads more, some by running other programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_READ_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Pictures that are not read. Their names count as images, so that each is refused by name and counted as skipped.
_REFUSED_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
)
# File names that count as images inside a folder or a shard.
SUFFIXES = _READ_SUFFIXES + _REFUSED_SUFFIXES
HEAD = 4096  # bytes that tell a format

RAW = "a camera's raw file; develop it and save it as JPEG, PNG or TIFF"
_HEIC = "HEIC; convert it to JPEG or PNG, for example with heif-convert of libheif"
_JPEG_2000 = "JPEG 2000; convert it to PNG, for example with opj_decompress of OpenJPEG"
_POSTSCRIPT = "PostScript (EPS); render it to PNG"
# (what a file begins with, format); a dot stands for any byte.
_MAGIC = [
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"(II|MM)(\*\0|\0\*|\+\0|\0\+)", "TIFF"),
    (rb"P[1-6f]\s", "PPM"),
    (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"....ftyp(avif|avis|(mif1|msf1)(.{4}){1,16}?avi[fs])", "AVIF"),
]
# The same for what is not read, with what to do about it.
_OTHERS = [
    (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", _HEIC),
    (rb"....ftypcrx |IIRO|IIRS|MMOR|IIU\0|FUJIFILMCCD-RAW", RAW),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL; convert it to PNG, for example with djxl of libjxl"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", _JPEG_2000),
    (rb"8BPS", "Photoshop's (PSD); export it as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", _POSTSCRIPT),
    (rb"%PDF", "PDF; render its pages to PNG"),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml.*?)?(<!--.*?-->\s*)?(<!DOCTYPE svg.*?)?<svg[\s>]", "SVG; render it to PNG"),
    (rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head)", "an HTML page"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "XML"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "gzip"),
    (rb"\0\x05\x16\x07", "what macOS stores beside a file (AppleDouble)"),
    (rb"....ftyp", "a video"),
    (rb"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with git lfs pull"),
]


def sniff(head: bytes) -> str:
    """One of `FORMATS`, by the first `HEAD` bytes of a file, whatever it is called.

    Raises:
        ValueError: another format; the message says which, and what to do.
    """
    for magic, name in _MAGIC:
        if re.match(magic, head, re.DOTALL):
            return name
    raise ValueError(f"not an image of a known format{_what_else(head)}")


def is_image_content(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file are those of an image that is read."""
    try:
        sniff(head)
    except ValueError:
        return False
    return True


def _what_else(head: bytes) -> str:
    if not head:
        return ": the file is empty"
    for magic, what in _OTHERS:
        if re.match(magic, head, re.DOTALL | re.IGNORECASE):
            return f", but {what}"
    if not any(head):
        return ": it begins with zeros"
    text = head.decode("utf-8", "ignore")
    plain = sum(char.isprintable() or char in "\r\n\t" for char in text)
    return ", but text" if len(text) > 0.9 * len(head) and plain == len(text) else ""


def is_image_name(name: str) -> bool | None:
    """Whether a file's name is that of an image; None if the name does not tell, as it has no suffix or a number."""
    stem, dot, suffix = name.rpartition(".")
    if not (stem and dot and suffix) or suffix.isdecimal():
        return None
    return name.lower().endswith(SUFFIXES)


def image_stem(name: str) -> str:
    """An image file's name without its suffix; a number, as in scan.000, is none."""
    return name if is_image_name(name) is None else name.rpartition(".")[0]
