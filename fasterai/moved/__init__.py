"""Old import paths: each file re-exports what has moved, and is found under its old name as well."""
