"""Stand-in: the inference client imports it for other models than ours."""
