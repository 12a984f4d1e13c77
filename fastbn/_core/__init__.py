"""The compiled room. Importing `dispatch` first says plainly where nothing is compiled."""

from . import dispatch as dispatch
