"""A board as of several ranks, which are objects of one process here."""

from streamprep.board import LocalBoard


class SharedBoard(LocalBoard):
    shared = True
