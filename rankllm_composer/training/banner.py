"""What a run prints about itself: before its first batch, and the commands that come next when it is complete."""

from __future__ import annotations
