"""Colours and markers of all figures, which are the library's."""

from modeling_stimg.palette import COLOURS, DARK_YELLOW, LINE_COLOURS, MARKERS, YELLOW

__all__ = ["COLOURS", "DARK_YELLOW", "LINE_COLOURS", "MARKERS", "YELLOW"]
