"""The commands of `fastdiff`, one file each, and what they share. Heavy imports stand inside the functions."""
