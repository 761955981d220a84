"""Routes of a teacher: its checkpoints on the way, by which a student follows it."""
