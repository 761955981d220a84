"""Models written to files that other programs run, each checked against the model before it takes its place."""
