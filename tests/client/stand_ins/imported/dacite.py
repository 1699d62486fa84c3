"""Stand-in: the inference client imports it and, as it is used here, does not call it."""

from_dict = None
