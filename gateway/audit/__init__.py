"""The audit log: one writer, signed checkpoints, and a verifier that trusts nobody. No web framework here."""
