"""Keys, signed notes and durable files: standard library and `cryptography` only."""
